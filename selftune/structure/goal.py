"""Target size of a model: units are closed during the run until the target is reached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selftune._arguments import COUNT, MODULE, NAMES, NONE, SHARE, TEXT, Number, checked
from selftune._trees import unchanged
from selftune.monitor import Monitor
from selftune.structure._saliency import Closure, buffers_kept, saliency
from selftune.structure._sizes import KINDS, Sizes
from selftune.structure._tracing import original
from selftune.structure.gates import gated, open_gates

log = logging.getLogger("selftune")

MEMORY = 0.5
"""Weight of the newest saliencies in their running mean."""
STALE = 128
"""Number of times that unit sizes are recomputed while all units are removed in turn."""


class Goal:
    """Shrinks a model to a given size, or as far as a loss tolerance allows, within one run.

    Minimises the loss over the weights and the closed units z subject to ``size(z) ≤ budget``. In
    the Lagrangian ``L + λ size(z)``, a unit stays open if its saliency, the estimated increase of
    the validation loss without it, exceeds λ times its size. λ is the dual variable: at each
    closing it is the smallest value that meets the scheduled size ::

        size(t) = budget + (1 − budget) (1 − (t − start)/(end − start))³

    Closed units stay closed: their mask is 0. The rest of the run trains the smaller model.

    Args:
        model: A model with gates (:class:`Gate`, :class:`Optional`, …).
        example: An input, or a tuple of inputs, for which multiply-adds are counted.
        budget: Final size: a fraction of the full size if in (0, 1], else an absolute number.
        of: ``"parameters"``, ``"multiply_adds"`` or both.
        tolerance: Maximum relative increase of the validation loss, summed over all closings and
            measured before the other weights adapt. Without a budget the model becomes as small
            as this allows.
        total_steps: Number of steps in the run; not needed with the tuner's callback.
        start: Fraction of the run before closing starts; by default 0.03, or 0.5 with a tolerance,
            because the loss of a model that has not learned yet hardly depends on its units.
        end: Fraction of the run at the last closing; by default 0.2, or 0.8 with a tolerance.
        closings: Number of closings.
        batches: Number of closure evaluations over which saliencies and losses are averaged.
        recorder: Where ``structure/…`` is logged; the same types as the optimizers' ``log_dir``.

    Attributes:
        price: λ at the last closing: the increase of the loss per unit of relative size.

    Raises:
        ValueError: Neither a budget nor a tolerance is given, the model cannot reach the budget, a
            fraction is out of range, or no unit of the model can be removed.

    Examples:
        >>> from selftune.structure import Gate
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Gate(8), nn.Linear(8, 1))
        >>> goal = Goal(net, torch.zeros(1, 4), budget=0.5, total_steps=10, closings=1)
        >>> x = torch.randn(32, 4)
        >>> for step in range(10):  # after opt.step()
        ...     closed = goal.step(lambda: net(x).square().mean())
        >>> goal.size()["parameters"], open_gates(net)
        (19, {'2': (3, 8)})

    Source: saliency, Theis et al. 2018; schedule, Zhu & Gupta 2017.
    """

    @checked(
        model=MODULE,
        budget=Number(above=0) | NONE,
        of=TEXT | NAMES,
        tolerance=Number(least=0) | NONE,
        total_steps=COUNT | NONE,
        start=SHARE | NONE,
        end=SHARE | NONE,
        **dict.fromkeys(("closings", "batches"), COUNT),
    )
    def __init__(
        self,
        model: nn.Module,
        example: Any,
        budget: float | None = None,
        *,
        of: str | Sequence[str] = "parameters",
        tolerance: float | None = None,
        total_steps: int | None = None,
        start: float | None = None,
        end: float | None = None,
        closings: int = 5,
        batches: int = 4,
        recorder: Any = None,
    ) -> None:
        kinds = [of] if isinstance(of, str) else list(of)
        if not kinds or set(kinds) - set(KINDS):
            raise ValueError(f"of={of!r} must be one of {', '.join(KINDS)}, or both")
        if budget is None and tolerance is None:
            raise ValueError(
                "a goal needs budget=, the final size, or tolerance=, the allowed loss increase"
            )
        early = tolerance is None
        start = (0.03 if early else 0.5) if start is None else start
        end = max(start, 0.2 if early else 0.8) if end is None else end
        if start > end:
            raise ValueError(f"start={start}, end={end} must be fractions of the run in this order")
        if not any(True for _ in gated(model)):
            raise ValueError(
                "model has no gates: put selftune.structure.Gate after the units that may be "
                "removed, or selftune.structure.Optional around blocks"
            )
        model = original(model)
        self._sizes = Sizes(model, example)
        if not self._sizes.places:
            raise ValueError(
                f"no unit of {', '.join(self._sizes.idle)} can be removed: other layers need all "
                "gated units"
            )
        if self._sizes.idle:
            log.warning(
                "goal: no unit of %s can be removed, because other layers need all of them",
                ", ".join(self._sizes.idle),
            )
        self._model, self._tolerance, self._total = model, tolerance, total_steps
        self._start, self._end, self._batches = start, end, batches
        self._target = self._sizes.target(budget, kinds)
        if total_steps is not None:
            spread = (end - start) * total_steps / closings
            due = (round(start * total_steps + spread * (i + 1)) for i in range(closings))
            self._due = {max(1, step) for step in due}
        self._known: dict[str, Tensor] = {}
        self._spent, self._taken, self._floored, self._ended = 0.0, 0, False, False
        self._postponed = False
        self._monitor = Monitor(recorder)
        self.price = 0.0

    def size(self) -> dict[str, float]:
        """Number of parameters and of multiply-adds per example, without closed units."""
        count = self._sizes.count(self._gone())
        return {kind: int(n) for kind, n in zip(KINDS, count, strict=True)}

    def step(self, closure: Closure) -> bool:
        """Close units if a closing is due; call after each ``opt.step()``.

        Returns True if units were closed. Then call ``opt.sync(weights=False)``, so that the guard
        does not mistake closed units for dead ones.

        Args:
            closure: Returns the validation loss of one batch, as for ``opt.hyper_step``.

        Raises:
            ValueError: ``total_steps`` is missing, or the loss does not depend on the gates.
        """
        if self._total is None:
            raise ValueError("total_steps=None: pass the number of steps in the run to Goal")
        self._taken += 1
        if self._taken not in self._due and not self._postponed:
            return False
        # If its step was rounded down, `progress` is below `end`; it must reach the final size.
        last = self._taken >= max(self._due)
        return self.close(closure, 1.0 if last else self._taken / self._total)

    def callback(self, closure: Closure) -> Callable[[Any], bool]:
        """A callback for the tuner, ``fit(callbacks=[...])``: closes units after evaluations.

        The last closing is at the first evaluation at or after ``end``.

        Checkpoints of the tuner contain the masks, but not :meth:`state_dict`.

        Args:
            closure: Returns the validation loss of one batch.
        """

        def closing(progress: Any) -> bool:
            self._taken, done = progress.step, progress.step / progress.total
            if not self._ended:
                self.close(closure, done)
            self._ended = done >= self._end and not self._postponed
            return False

        return closing

    def close(self, closure: Closure, progress: float) -> bool:
        """Close units down to the scheduled size; returns True if any were closed.

        If the loss is not finite, the closing is postponed to the next call, with a warning.

        Args:
            closure: Returns the validation loss of one batch.
            progress: Completed fraction of the run, in [0, 1].
        """
        gone = self._gone()
        done = 1.0 if progress >= self._end else (progress - self._start) / max(
            self._end - self._start, 1e-12
        )  # fmt: skip
        if done <= 0 or bool((self._sizes.count(gone) <= self._target).all()):
            return False
        left = (1 - done) ** 3
        want = (1 - left) * self._target + left * self._sizes.whole if left else self._target
        self._name_forgotten()
        with buffers_kept(self._model):
            worth = self._saliencies(closure)
            self._postponed = worth is None
            if worth is None:
                log.warning(
                    "goal: the validation loss or its gradient is not finite; closing is postponed"
                )
                return False
            order, prices = self._order(gone, worth, want)
            if self._tolerance is not None:
                order = self._tolerated(closure, order, 1 - left)
        if order:
            self.price = prices[len(order) - 1]
            self._mask(order)
            self._name_floor()
        self._log()
        return bool(order)

    # inside

    def _gone(self) -> NDArray[np.bool_]:
        """Which units are closed, shape (units,)."""
        closed = {n: m.closed().cpu().numpy() for n, m in gated(self._model)}
        return np.array([all(closed[n][i] for n, i in at) for at in self._sizes.places])

    def _saliencies(self, closure: Closure) -> NDArray[np.float64] | None:
        """Saliency of each unit, shape (units,); None if some are not finite."""
        fresh: dict[str, Tensor] = {}
        needed = {name for at in self._sizes.places for name, _ in at}
        for _ in range(self._batches):
            for name, value in saliency(self._model, closure, needed).items():
                fresh[name] = fresh.get(name, 0.0) + value / self._batches
        if not all(bool(torch.isfinite(value).all()) for value in fresh.values()):
            return None
        known = self._known or fresh
        self._known = {n: known[n] + MEMORY * (v - known[n]) for n, v in fresh.items()}
        saliencies = {n: v.double().cpu().numpy() for n, v in self._known.items()}
        return np.array([sum(saliencies[n][i] for n, i in at) for at in self._sizes.places])

    def _order(
        self, gone: NDArray[np.bool_], worth: NDArray[np.float64], want: NDArray[np.float64]
    ) -> tuple[list[int], list[float]]:
        """Units to close until the size is met, by saliency per size, and λ after each."""
        order: list[int] = []
        prices: list[float] = []
        gone, whole = gone.copy(), self._sizes.whole
        stale = max(1, len(gone) // STALE)
        while True:
            over = self._sizes.count(gone) > want
            if not over.any():
                return order, prices
            if len(order) % stale == 0:  # in large models the next few removals change it little
                saved = self._sizes.saved(gone) / whole[:, None]
            cost = saved[over].mean(0)
            free = (cost > 0) & ~gone & ~self._sizes.last(gone)
            if not free.any():
                return order, prices
            rate = np.where(free, worth / np.where(free, cost, 1.0), np.inf)
            first = int(rate.argmin())
            prices.append(max(float(rate[first]), prices[-1] if prices else 0.0))
            gone[first] = True
            order.append(first)

    def _name_forgotten(self) -> None:
        """Warn that the tolerance restarts if another goal has closed units before."""
        masked = any(bool((m.mask == 0).any()) for _, m in gated(self._model))
        if self._tolerance is not None and masked and not self._known:
            log.warning(
                "goal: units are already closed; tolerance=%g counts from the current loss. To "
                "continue a goal, load its state_dict into this one",
                self._tolerance,
            )

    def _name_floor(self) -> None:
        """Warn once if no more units can be closed."""
        if not self._floored and bool(self._sizes.last(self._gone())[~self._gone()].all()):
            self._floored = True
            log.warning("goal: all units but one of each layer are closed")

    def _tolerated(self, closure: Closure, order: list[int], done: float) -> list[int]:
        """The longest prefix of an order within the tolerance, found by bisection."""
        assert self._tolerance is not None
        before, masks = self._loss(closure), [m.mask for _, m in gated(self._model)]
        allowed = self._tolerance * abs(before) * done - self._spent
        low, high, rise = 0, len(order), 0.0
        while low < high:
            middle = (low + high + 1) // 2
            with unchanged(masks):  # also if the closure fails or is interrupted
                self._mask(order[:middle])
                rose = self._loss(closure) - before
            if rose <= allowed:
                low, rise = middle, rose
            else:
                high = middle - 1
        self._spent += max(rise, 0.0) if low else 0.0
        return order[:low]

    def _loss(self, closure: Closure) -> float:
        """The mean over batches, the same ones if drawn by torch's generator."""
        losses: list[float] = []
        with torch.no_grad(), torch.random.fork_rng():
            for at in range(self._batches):
                torch.manual_seed(at)
                losses.append(float(closure()))
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _mask(self, units: Sequence[int]) -> None:
        masks = {n: m.mask for n, m in gated(self._model)}
        for unit in units:
            for name, at in self._sizes.places[unit]:
                masks[name][at] = 0.0

    def _log(self) -> None:
        if self._monitor.on:
            size, whole = self.size(), dict(zip(KINDS, self._sizes.whole, strict=True))
            rows = [(f"structure/{k}", size[k] / whole[k]) for k in KINDS]
            rows += [(f"structure/open/{n}", float(k)) for n, (k, _) in self.open().items()]
            self._monitor.scalars([*rows, ("structure/price", self.price)], self._taken)
            self._monitor.flush()

    def open(self) -> dict[str, tuple[int, int]]:
        """Number of open gates and of all gates, by module."""
        return open_gates(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Running means and counters; the masks are in the model's state dict."""
        known = {n: v.clone() for n, v in self._known.items()}
        return {
            "known": known, "spent": self._spent, "taken": self._taken, "price": self.price,
            "ended": self._ended, "postponed": self._postponed,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._known = dict(state["known"])
        self._spent, self._taken = float(state["spent"]), int(state["taken"])
        self._ended = bool(state["ended"])
        self._postponed = bool(state["postponed"])
        self.price = float(state["price"])
