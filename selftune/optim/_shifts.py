"""The tuned hyperparameters of an optimizer: values of all tensors, and the shifts they share.

A tuned hyperparameter has a *base* for every parameter tensor, taken from its parameter
group, and a shared *shift* in raw space that is tuned::

    value[segment] = bijection(raw(base[segment]) + shift[slot(segment)])

With the default scope, ``"run"``, there is one slot, so groups keep the ratio of their
learning rates (``Log``) while one factor moves them all. ``"group"`` and ``"tensor"`` give
every parameter group, or every tensor, a shift of its own. A segment is one parameter tensor.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune.hparams import Hparam, choose
from selftune.method import Frame, HyperOptimizer, HyperSettings, HyperState, WeightDecayFloor
from selftune.schedules import HORIZON

log = logging.getLogger("selftune")

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
SCOPES = ("run", "group", "tensor")


class Scoped:
    """One tuned hyperparameter across all parameter tensors.

    Attributes:
        hparam: Name, scale and bounds.
        base: Raw values shifted from, one a segment; NaN where the hyperparameter is off.
        slots: Which shift belongs to each segment.
        from_zero: Whether every segment started at 0.
        start: The values last taken, one a segment.
    """

    def __init__(self, hparam: Hparam, scope: str) -> None:
        """Start with no segments; ``layout`` sets them."""
        self.hparam = hparam
        self.scope = scope
        self.base = torch.empty(0, dtype=torch.float64)
        self.slots = torch.empty(0, dtype=torch.long)
        self.shift = torch.zeros(0, dtype=torch.float64)
        self.from_zero = False
        self.start: list[float] = []

    def lay_out(
        self,
        values: Sequence[float],
        groups: Sequence[int],
        known: Sequence[int | None] | None = None,
    ) -> None:
        """Take each segment's value and group; shifts already tuned are kept.

        A value of exactly 0 stays 0 beside others that are not; if all are 0, tuning starts
        from ``hparam.from_zero``.

        Args:
            values: The present value of each segment.
            groups: The parameter group of each segment.
            known: Where each segment stood before, None for a new one; by default all are new.
        """
        start = torch.tensor(values, dtype=torch.float64)
        if len(self.base) == 0:
            self.from_zero = not bool(start.any())
        slots = {"run": [0] * len(groups), "group": groups, "tensor": range(len(groups))}
        self.slots = torch.tensor(list(slots[self.scope]), dtype=torch.long)
        count = int(self.slots.max()) + 1
        if count > len(self.shift):
            grown = torch.zeros(count, dtype=torch.float64)
            grown[: len(self.shift)] = self.shift
            self.shift = grown
        if self.scope == "tensor" and known is not None:
            shift = torch.zeros(count, dtype=torch.float64)
            for at, before in enumerate(known):
                if before is not None:
                    shift[at] = self.shift[before]
            self.shift = shift
        base = self._raw(start) - self.shift[self.slots]
        if self.from_zero:
            small = self._raw(torch.full_like(start, self.hparam.from_zero))
            base = torch.where(start == 0, small, base)
        for at, before in enumerate(known or []):
            if before is not None:
                base[at] = self.base[before]
        self.base, self.start = base, start.tolist()
        self._measure()
        self.clamp()

    def _raw(self, values: Tensor) -> Tensor:
        off = torch.full_like(values, math.nan)
        return torch.where(values == 0, off, self.hparam.bijection.inverse(values))

    def rebase(self, segments: Sequence[int], value: float, shown: float) -> None:
        """Move segments that showed one value to another, which was set from outside."""
        index = torch.tensor(segments)
        new, old = self._raw(torch.tensor([value, shown], dtype=torch.float64))
        moved = self.base[index] + (new - old)
        self.base[index] = torch.where(moved.isnan(), new - self.shift[self.slots[index]], moved)
        self._measure()

    def resume(self, base: Tensor, shift: Tensor) -> None:
        """Continue from saved values."""
        self.base, self.shift = base.clone(), shift.clone()
        self._measure()

    @property
    def shift(self) -> Tensor:
        """The tuned raw shifts, shape (number of slots,), float64; replaced, never modified."""
        return self._shift

    @shift.setter
    def shift(self, value: Tensor) -> None:
        self._shift = value
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        """Constrained values, one a segment; 0 where it is off."""
        if self._values is None:
            raw = self.base + self.shift[self.slots]
            self._values = self.hparam.bijection.forward(raw).nan_to_num(0.0)
        return self._values

    def slopes(self) -> Tensor:
        """The derivative of each value in its raw shift; 0 where it is off."""
        values = self.values()
        return torch.where(self.base.isnan(), 0.0, self.hparam.bijection.slope(values))

    def gather(self, signal: Tensor) -> Tensor:
        """Sum per-segment derivatives into the shifts they share."""
        return torch.zeros_like(self.shift).index_add_(0, self.slots, signal)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """How far each shift may go before one of its segments leaves the bounds."""
        low, high = self.hparam.raw_ends
        return low - self._lowest, high - self._highest

    @property
    def origin(self) -> Tensor:
        """The outermost base of each slot: of a regularizer the lowest, else the highest."""
        found = self._lowest if self.hparam.role == "regularizer" else self._highest
        return found.nan_to_num(posinf=0.0, neginf=0.0)

    def _measure(self) -> None:
        """Find the outermost bases of each slot, where those that are off do not count."""
        self._values = None
        lowest, highest = (
            torch.full_like(self.shift, math.inf),
            torch.full_like(self.shift, -math.inf),
        )
        on = ~self.base.isnan()
        self._lowest = lowest.scatter_reduce(0, self.slots[on], self.base[on], "amin")
        self._highest = highest.scatter_reduce(0, self.slots[on], self.base[on], "amax")

    def clamp(self) -> None:
        """Bring the shifts back within the bounds."""
        low, high = self.bounds()
        self.shift = self.shift.maximum(low).minimum(high.maximum(low))


class FromOutside:
    """Proposes changes of the shifts by any torch optimizer.

    Args:
        make: Builds it over one parameter.
        raw: The shifts.
    """

    def __init__(self, make: MakeOptimizer, raw: Tensor) -> None:
        self._raw = raw.clone().requires_grad_()
        self.optimizer = make([self._raw])

    def __call__(self, raw: Tensor, grads: Tensor) -> Tensor:
        """The change it makes along hypergradients."""
        with torch.no_grad():
            self._raw.copy_(raw)
        self._raw.grad = grads.clone()
        self.optimizer.step()
        self._raw.grad = None
        return self._raw.detach() - raw


class Shifts:
    """The tuned hyperparameters of an optimizer and the state of their steps.

    Args:
        hparams: Every hyperparameter of the update by name.
        tune: Names of those tuned.
        size: Size of a hyperparameter step in raw space.
        per: ``"run"``, ``"group"`` or ``"tensor"``, for all or by name: what shares one shift.
        bounds: Narrower or wider bounds by name.
        total_steps: Steps in the run, or None.
        floor: Under weight decay, where the user sets no bounds; None: there is none.
        settings: How far steps go.
        make: Builds a torch optimizer of the shifts; None: Adam, as part of the method.

    Attributes:
        rows: The tuned hyperparameters by name.
        hyper: How the shifts step.
        state: The shifts.
        memory: 1/(1 − μ) of heavy-ball momentum, tuned or not.

    Raises:
        ValueError: An unknown name in ``tune``, ``per`` or ``bounds``, or an unknown scope.
    """

    def __init__(
        self,
        hparams: Mapping[str, Hparam],
        *,
        tune: Sequence[str],
        size: float,
        per: str | Mapping[str, str] = "run",
        bounds: Mapping[str, tuple[float, float]] | None = None,
        total_steps: int | None = None,
        floor: WeightDecayFloor | None = None,
        settings: HyperSettings | None = None,
        make: MakeOptimizer | None = None,
    ) -> None:
        scopes = dict.fromkeys(hparams, per) if isinstance(per, str) else dict(per)
        self.total_steps, self.horizon = total_steps, total_steps or HORIZON
        self.tuned = choose(hparams, tune, bounds, self.horizon)
        for name, scope in scopes.items():
            if name not in hparams:
                raise ValueError(f"per={name!r} is unknown: use one of {list(hparams)}")
            if scope not in SCOPES:
                raise ValueError(f"per={scope!r} for {name!r} is unknown: use one of {SCOPES}")
        self._floor = None if "weight_decay" in (bounds or {}) else floor
        self._size, self._settings, self._make = size, settings, make
        self.memory = 1.0
        self.rows = {n: Scoped(h, scopes.get(n, "run")) for n, h in self.tuned.items()}
        self.hyper = HyperOptimizer(self.tuned, size=size, settings=settings, floor=self._floor)
        self.state = HyperState.begin(torch.zeros(len(self.tuned), dtype=torch.float64))
        self.propose: FromOutside | None = None
        self._laid_out = False

    @property
    def names(self) -> list[str]:
        """Names of the tuned hyperparameters, in the order of the shifts."""
        return list(self.rows)

    @property
    def shared(self) -> bool:
        """Whether every hyperparameter has a single shift for the whole run."""
        return all(t.scope == "run" for t in self.rows.values())

    def lay_out(
        self,
        values: Mapping[str, Sequence[float]],
        groups: Sequence[int],
        known: Sequence[int | None] | None = None,
    ) -> None:
        """Take values and groups of all segments; see :meth:`Scoped.lay_out`."""
        sizes = [len(t.shift) for t in self.rows.values()]
        for name, tuned in self.rows.items():
            tuned.lay_out(values[name], groups, known)
            given, present = max(values[name]), float(tuned.values().max())
            if not self._laid_out and given > 0 and abs(present / given - 1) > 1e-9:
                log.warning(
                    "%s starts at %.4g, not %.4g: its bounds are %.4g to %.4g; pass bounds= for "
                    "others", name, present, given, tuned.hparam.lower, tuned.hparam.upper,
                )  # fmt: skip
        shifts = [t.shift for t in self.rows.values()]
        moved = known is not None and known != list(range(len(known)))
        if not self._laid_out or sizes != [len(s) for s in shifts] or moved:
            self._laid_out = True
            self.hyper = HyperOptimizer(
                self.tuned, size=self._size, settings=self._settings, floor=self._floor,
                shifts=[len(s) for s in shifts],
            )  # fmt: skip
            self.state = HyperState.begin(_joined(shifts))
            if self._make is not None:
                self.propose = FromOutside(self._make, self.state.raw)
        frame = self.frame()
        raw = _joined(shifts).maximum(frame.low).minimum(frame.high)
        self.take(self.state._replace(raw=raw))

    def frame(self) -> Frame:
        """Where the shifts are measured from, and their bounds."""
        pairs = [t.bounds() for t in self.rows.values()]
        low = _joined([p[0] for p in pairs])
        origin = _joined([t.origin for t in self.rows.values()])
        return Frame(origin, low, _joined([p[1] for p in pairs]).maximum(low))

    def take(self, state: HyperState) -> None:
        """Go on from another state of the shifts."""
        self.state = state
        for name, tuned in self.rows.items():
            tuned.shift = state.raw[self.hyper.slots(name)].clone()

    def move(self, moves: Mapping[str, float]) -> None:
        """Add to the raw values of hyperparameters that are tuned."""
        raw, frame = self.state.raw, self.frame()
        for name, change in moves.items():
            raw = self.hyper.move(raw, name, change, frame)
        self.take(self.state._replace(raw=raw))

    def forget(self) -> None:
        """Forget past hypergradients; the shifts stay."""
        self.take(self.state.forget())
        if self.propose is not None:
            self.propose.optimizer.state.clear()

    def gather(self, signal: Tensor) -> Tensor:
        """Hypergradients of the shifts, from those of all tensors.

        Args:
            signal: Shape (hyperparameters, tensors), or (hyperparameters, 1) where all shifts are
                shared.
        """
        signal = signal.to("cpu", torch.float64)
        if self.shared:
            return signal.sum(1)
        pairs = zip(self.rows.values(), signal, strict=True)
        return _joined([tuned.gather(row) for tuned, row in pairs])

    def value(self, name: str) -> float:
        """The largest present value of a tuned hyperparameter, 0 if it is not tuned."""
        return float(self.rows[name].values().max()) if name in self.rows else 0.0

    def values(self) -> dict[str, float]:
        """The largest present value of each."""
        return {n: self.value(n) for n in self.rows}

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        outside = None if self.propose is None else self.propose.optimizer.state_dict()
        return {
            "state": {n: t.clone() for n, t in self.state._asdict().items()},
            "base": {n: t.base.clone() for n, t in self.rows.items()},
            "optimizer": copy.deepcopy(outside),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, tuned in self.rows.items():
            shift = state["state"]["raw"][self.hyper.slots(name)]
            tuned.resume(state["base"][name], shift)
        self.take(HyperState(**{n: t.clone() for n, t in state["state"].items()}))
        if self.propose is not None:
            self.propose.optimizer.load_state_dict(state["optimizer"])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.float64)
