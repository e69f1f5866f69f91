"""All tuned hyperparameters of a run together: what they are worth, and how they step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selftune.floor import Floor
from selftune.hparams import MOMENTA, SCOPES, Hparam, Tuned
from selftune.hyperstep import HyperOptimizer, HyperStep, adam
from selftune.schedules import HORIZON

log = logging.getLogger("selftune")

PACE = {"momentum": 0.2, "beta1": 0.2}
"""Relative step sizes: momenta repay patience (ablations)."""
MEMORY = 20
"""How many times the memory 1/(1 − μ) of a tuned momentum must fit into the run."""


def choose(
    hparams: Mapping[str, Hparam],
    tune: Sequence[str],
    bounds: Mapping[str, tuple[float, float]],
    horizon: int,
) -> dict[str, Hparam]:
    """The hyperparameters named in ``tune``, within bounds that fit the horizon.

    Raises:
        ValueError: An unknown name in ``tune`` or ``bounds``, or bounds that do not fit a scale.
    """
    if isinstance(tune, str):
        raise ValueError(f"tune={tune!r} must be a sequence of names: ({tune!r},)")
    for argument, names in (("tune", tune), ("bounds", bounds)):
        for name in names:
            if name not in hparams:
                raise ValueError(f"{argument}={name!r} is unknown: use one of {list(hparams)}")
    chosen = {n: h for n, h in hparams.items() if n in tune}
    for name, hparam in chosen.items():
        if name in bounds:
            chosen[name] = hparam.bounded(*bounds[name])
        elif name in MOMENTA:
            chosen[name] = replace(hparam, upper=max(0.9, 1 - MEMORY / horizon))
    return chosen


class Tuning:
    """The tuned hyperparameters and the optimizer that moves them.

    Args:
        hparams: Every hyperparameter of the update by name.
        tune: Names of those tuned.
        per: ``"run"``, ``"group"`` or ``"tensor"``, for all or by name: what shares one shift.
        bounds: Narrower or wider bounds by name.
        horizon: Steps in the run, or None.
        floor: Under weight decay, where the user sets no bounds; None: there is none.
        make: Builds the hyper optimizer.

    Raises:
        ValueError: An unknown name in ``tune``, ``per`` or ``bounds``, or an unknown scope.
    """

    def __init__(
        self,
        hparams: Mapping[str, Hparam],
        *,
        tune: Sequence[str],
        per: str | Mapping[str, str] = "run",
        bounds: Mapping[str, tuple[float, float]] | None = None,
        horizon: int | None = None,
        floor: Floor | None = None,
        make: HyperOptimizer = adam,
    ) -> None:
        scopes = dict.fromkeys(hparams, per) if isinstance(per, str) else dict(per)
        self.total_steps, self.horizon = horizon, horizon or HORIZON
        limits = dict(bounds or {})
        chosen = choose(hparams, tune, limits, self.horizon)
        for name, scope in scopes.items():
            if name not in hparams:
                raise ValueError(f"per={name!r} is unknown: use one of {list(hparams)}")
            if scope not in SCOPES:
                raise ValueError(f"per={scope!r} for {name!r} is unknown: use one of {SCOPES}")
        floored = {"lr", "weight_decay"} <= set(chosen) and "weight_decay" not in limits
        self._floor = floor if floored else None
        self.memory = 1.0  # 1/(1 − μ) of heavy-ball momentum, tuned or not
        self.rows = {n: Tuned(h, scopes.get(n, "run")) for n, h in chosen.items()}
        self._make = make
        self._step: HyperStep | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tuned hyperparameters, in the order of the tangents."""
        return list(self.rows)

    @property
    def shared(self) -> bool:
        """Whether every hyperparameter has a single shift for the whole run."""
        return all(t.scope == "run" for t in self.rows.values())

    @property
    def hyper(self) -> HyperStep:
        """The optimizer of the shifts."""
        if self._step is None:
            raise RuntimeError("no parameters yet: lay_out comes first")
        return self._step

    def lay_out(
        self,
        values: Mapping[str, Sequence[float]],
        groups: Sequence[int],
        known: Sequence[int | None] | None = None,
    ) -> None:
        """Take values and groups of all segments; see :meth:`Tuned.lay_out`."""
        sizes = [len(t.shift) for t in self.rows.values()]
        for name, tuned in self.rows.items():
            tuned.lay_out(values[name], groups, known)
            given, present = max(values[name]), float(tuned.values().max())
            if self._step is None and given > 0 and abs(present / given - 1) > 1e-9:
                log.warning(
                    "%s starts at %.4g, not %.4g: its bounds are %.4g to %.4g; pass bounds= for "
                    "others", name, present, given, tuned.hparam.lower, tuned.hparam.upper,
                )  # fmt: skip
        shifts = [t.shift for t in self.rows.values()]
        moved = known is not None and known != list(range(len(known)))
        if self._step is None or sizes != [len(s) for s in shifts] or moved:
            paces = [torch.full_like(t.shift, PACE.get(n, 1.0)) for n, t in self.rows.items()]
            self._step = HyperStep(_joined(paces), self._make)
        self._write(_joined(shifts))

    def slots(self, name: str) -> slice:
        """Where a hyperparameter's shifts lie in the joined vector."""
        start = 0
        for other, tuned in self.rows.items():
            if other == name:
                return slice(start, start + len(tuned.shift))
            start += len(tuned.shift)
        raise KeyError(name)

    def _write(self, raw: Tensor) -> None:
        """Set all shifts, within their bounds."""
        low, high = self.bounds()
        raw = raw.maximum(low).minimum(high.maximum(low))
        with torch.no_grad():
            self.hyper.raw.copy_(raw)
        self._share(raw)

    def _share(self, raw: Tensor) -> None:
        for name, tuned in self.rows.items():
            tuned.shift = raw[self.slots(name)].clone()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest shifts, joined."""
        pairs = [t.bounds() for t in self.rows.values()]
        return _joined([p[0] for p in pairs]), _joined([p[1] for p in pairs])

    def move(self, name: str, raw: float) -> None:
        """Add to a hyperparameter's raw shifts, if it is tuned."""
        if name in self.rows:
            joined = self.hyper.raw.detach().clone()
            joined[self.slots(name)] += raw
            self._write(joined)

    def step(
        self, signal: Tensor, names: Sequence[str], *, climb: float = 1.0, steps: int = 0
    ) -> None:
        """One step along hypergradients.

        Args:
            signal: dL/d(raw) of each hyperparameter and segment, shape (hyperparameters,
                segments), or (hyperparameters, 1) where all shifts are shared.
            names: The hyperparameters that may move; the others stay.
            climb: How much of a step of the learning rate is taken where it rises.
            steps: Training steps so far.
        """
        signal = signal.to("cpu", torch.float64)
        rows = dict(zip(self.rows, signal, strict=True))
        coupled = "lr" in names and "momentum" in names and self.shared
        before = self.value("momentum")
        tied = "weight_decay" in names and self._lay_floor(steps)
        if coupled:
            # Momentum moves at a constant lr / (1 − μ); otherwise both would chase the same
            # effective rate: the raw value of a momentum is −log(1 − μ).
            rows["momentum"] = rows["momentum"] - rows["lr"]
        if tied:  # the rate takes the decay along, at a constant η λ
            rows["lr"] = rows["lr"] - rows["weight_decay"]
        grads = [
            rows[n].sum().view(1) if self.shared else t.gather(rows[n])
            for n, t in self.rows.items()
        ]
        moving = [torch.full_like(t.shift, n in names) for n, t in self.rows.items()]
        was = self.hyper.raw.detach().clone()
        self.hyper.step(_joined(grads), *self.bounds(), _joined(moving).bool())
        if "lr" in self.rows:
            at = self.slots("lr")
            rise = (self.hyper.raw.detach() - was)[at].clamp_min(0.0)
            with torch.no_grad():
                self.hyper.raw[at] -= (1 - climb) * rise
        self._share(self.hyper.raw.detach())
        if tied:
            self._lay_floor(steps)  # where the rate has led it
            self.move("weight_decay", float((was - self.hyper.raw.detach())[at]))
        if coupled:
            after = self.value("momentum")
            self.move("lr", math.log((1 - after) / (1 - before)))

    def _lay_floor(self, steps: int) -> bool:
        """Lay the floor under weight decay; whether it lies there, and so follows the rate."""
        rate = self.value("lr") * self.memory
        if self._floor is None or rate == 0:
            return False
        tuned = self.rows["weight_decay"]
        least, highest = self._floor.least(rate, steps), self._floor.highest(tuned.hparam)
        tuned.limit(min(least, highest))
        low, _ = tuned.bounds()
        above = float((tuned.shift - low).max())
        return self.shared and least < highest and self._floor.touched(above)

    def value(self, name: str) -> float:
        """The largest present value of a tuned hyperparameter, 0 if it is not tuned."""
        return float(self.rows[name].values().max()) if name in self.rows else 0.0

    def signals(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean hypergradient and signal-to-noise ratio of each hyperparameter's shifts."""
        mean, snr = self.hyper.mean, self.hyper.snr
        return {n: (mean[self.slots(n)], snr[self.slots(n)]) for n in self.rows}

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        bases = {n: t.base.clone() for n, t in self.rows.items()}
        lower = {n: t.hparam.lower for n, t in self.rows.items()}
        return {"hyper": self.hyper.state_dict(), "base": bases, "lower": lower}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.hyper.load_state_dict(state["hyper"])
        for name, tuned in self.rows.items():
            shift = self.hyper.raw.detach()[self.slots(name)]
            tuned.resume(state["base"][name], state["lower"][name], shift)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.float64)
