"""The tuned hyperparameters of an optimizer and the state of their steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune.hparams import Hparam, choose
from selftune.method import Frame, HyperOptimizer, HyperSettings, HyperState, WeightDecayFloor
from selftune.monitor.axes import middle
from selftune.optim._scoped import SCOPES, Scoped
from selftune.rules import AbstractRule
from selftune.schedules import HORIZON

log = logging.getLogger("selftune")

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class TorchProposal:
    """Proposes changes of the shifts with a torch optimizer."""

    def __init__(self, make: MakeOptimizer, raw: Tensor) -> None:
        self._raw = raw.clone().requires_grad_()
        self.optimizer = make([self._raw])

    def __call__(self, raw: Tensor, grads: Tensor) -> Tensor:
        with torch.no_grad():
            self._raw.copy_(raw)
        self._raw.grad = grads.clone()
        self.optimizer.step()
        self._raw.grad = None
        return self._raw.detach() - raw


class Shifts:
    """The tuned hyperparameters of an optimizer and the state of their steps.

    Args:
        size: Size of a hyperparameter step in raw space.
        per: Scope of one shift, for all or by name: ``"run"``, ``"group"`` or ``"tensor"``.
        bounds: Narrower or wider bounds by name.
        floor: Weight decay floor, used if the user sets no bounds; or None.
        make: Builds a torch optimizer of the shifts; None for the method's Adam.

    Attributes:
        rows: The tuned hyperparameters by name.
        hyper: The step of the shifts.
        state: The shifts.
        memory: 1/(1 − μ) of heavy-ball momentum, tuned or not.
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
        label: str = "selftune",
    ) -> None:
        scopes = dict.fromkeys(hparams, per) if isinstance(per, str) else dict(per)
        self.horizon = total_steps or HORIZON
        self.tuned = choose(hparams, tune, bounds, self.horizon)
        for name, scope in scopes.items():
            if name not in hparams:
                raise ValueError(f"per={name!r} is unknown: use one of {list(hparams)}")
            if scope not in SCOPES:
                raise ValueError(f"per={scope!r} for {name!r} is unknown: use one of {SCOPES}")
        floor = None if "weight_decay" in (bounds or {}) else floor
        self.memory, self._make, self._label = 1.0, make, label
        self.rows = {n: Scoped(h, scopes.get(n, "run")) for n, h in self.tuned.items()}
        self.hyper = HyperOptimizer(self.tuned, size=size, settings=settings, floor=floor)
        self.state = HyperState.begin(
            torch.zeros(len(self.tuned), dtype=torch.float64, device="cpu")
        )
        self.propose: TorchProposal | None = None
        self._laid_out = False

    @property
    def names(self) -> list[str]:
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
        siblings: Sequence[int | None] | None = None,
    ) -> None:
        """Set values and groups of all segments; see :meth:`Scoped.lay_out`."""
        sizes = [len(t.shift) for t in self.rows.values()]
        for name, tuned in self.rows.items():
            tuned.lay_out(values[name], groups, known, siblings)
            given, present = max(values[name]), self.value(name)
            if not self._laid_out and given > 0 and abs(present / given - 1) > 1e-9:
                log.warning(
                    "%s: %s starts at %.4g, not %.4g: its bounds are %.4g to %.4g; pass bounds= "
                    "to change them", self._label, name, present, given,
                    tuned.hparam.lower, tuned.hparam.upper,
                )  # fmt: skip
        shifts = [t.shift for t in self.rows.values()]
        moved = known is not None and known != list(range(len(known)))
        if not self._laid_out or sizes != [len(s) for s in shifts] or moved:
            self._laid_out, now = True, self.hyper
            self.hyper = HyperOptimizer(
                self.tuned, size=now.size, settings=now.settings, floor=now.floor,
                shifts=[len(s) for s in shifts],
            )  # fmt: skip
            self.state = HyperState.begin(_joined(shifts))
            if self._make is not None:
                self.propose = TorchProposal(self._make, self.state.raw)
        self.take(self.state._replace(raw=_joined(shifts)))

    @property
    def asleep(self) -> list[str]:
        """Names of values given as 0, which stay 0 until the first validation loss."""
        return [n for n, t in self.rows.items() if bool(t.asleep.any())]

    def wake(self) -> bool:
        return any([tuned.wake() for tuned in self.rows.values()])

    def frame(self) -> Frame:
        pairs = [t.bounds for t in self.rows.values()]
        low = _joined([p[0] for p in pairs])
        origin = _joined([t.origin for t in self.rows.values()])
        return Frame(origin, low, _joined([p[1] for p in pairs]).maximum(low))

    def take(self, state: HyperState) -> None:
        self.state = state
        for name, tuned in self.rows.items():
            tuned.shift = state.raw[self.hyper.slots[name]].clone()

    def move(self, moves: Mapping[str, float]) -> None:
        raw, frame = self.state.raw, self.frame()
        for name, change in moves.items():
            raw = self.hyper.move(raw, name, change, frame)
        self.take(self.state._replace(raw=raw))

    def begin_again(self, rule: AbstractRule, moves: Mapping[str, float]) -> None:
        """Reset the state of past hypergradients, and change raw values through their bases.

        ``rule`` is the one that the run continues with; moves that are not tuned are ignored.
        """
        self.memory = 1.0
        if self.hyper.floor is not None:
            self.hyper.floor = self.hyper.floor.under(rule)
        for name in moves.keys() & self.rows.keys():
            self.rows[name].displace(moves[name])
        frame = self.frame()
        raw = self.state.raw.maximum(frame.low).minimum(frame.high)
        self.take(HyperState.begin(raw))  # without the divergences of another rule
        self.forget()

    def forget(self) -> None:
        """Reset the state of past hypergradients; the shifts do not change."""
        self.take(self.state.forget())
        if self.propose is not None:
            self.propose.optimizer.state.clear()

    def gather(self, signal: Tensor) -> Tensor:
        """Hypergradients of the shifts, from those of all tensors.

        Their shape is (hyperparameters, tensors), or (hyperparameters, 1) where all shifts are
        shared.
        """
        signal = signal.to("cpu", torch.float64)
        if self.shared:
            return signal.sum(1)
        pairs = zip(self.rows.values(), signal, strict=True)
        return _joined([tuned.gather(row) for tuned, row in pairs])

    def value(self, name: str) -> float:
        """The largest current value of a tuned hyperparameter, 0 if it is not tuned."""
        return float(self.rows[name].values().max()) if name in self.rows else 0.0

    @property
    def climb(self) -> float:
        """Log of the ratio of the learning rate to its initial value."""
        return float(self.rows["lr"].shift.max()) if "lr" in self.rows else 0.0

    def values(self) -> dict[str, float]:
        """The largest current value of each tuned hyperparameter."""
        return {n: self.value(n) for n in self.rows}

    def middles(self) -> dict[str, float]:
        """The value of each tuned hyperparameter that represents groups or tensors that differ."""
        return {n: middle(t.values().tolist()) for n, t in self.rows.items()}

    @property
    def optimizer_name(self) -> str | None:
        """Class of the torch optimizer of the shifts; None for the method's Adam."""
        return None if self.propose is None else type(self.propose.optimizer).__name__

    def state_dict(self) -> dict[str, Any]:
        outside = None if self.propose is None else self.propose.optimizer.state_dict()
        return {
            "state": {n: t.clone() for n, t in self.state._asdict().items()},
            "base": {n: t.base.clone() for n, t in self.rows.items()},
            "given": {n: t.given for n, t in self.rows.items()},
            "asleep": {n: (t.asleep.clone(), t.waiting) for n, t in self.rows.items()},
            "optimizer": copy.deepcopy(outside),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tuned in self.rows.items():
            shift = state["state"]["raw"][self.hyper.slots[name]]
            asleep, waiting = state["asleep"][name]
            tuned.given = state["given"][name]
            tuned.resume(state["base"][name].cpu(), shift.cpu(), asleep.cpu(), waiting)
        self.take(HyperState(**{n: t.to("cpu", copy=True) for n, t in state["state"].items()}))
        if self.propose is not None:
            self.propose.optimizer.load_state_dict(state["optimizer"])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")
