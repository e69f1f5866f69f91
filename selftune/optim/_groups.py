"""Synchronisation of torch's parameter groups with the tuned hyperparameters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.hparams import DECAY, LR
from selftune.optim._block import Block
from selftune.optim._checks import check_option
from selftune.optim._scoped import Scoped
from selftune.optim._shifts import Shifts
from selftune.schedules import inverse_time
from selftune.update import Update

Group = dict[str, Any]
SAVED = ("_shown", "_scheduled", "_factors", "_seen", "annealed", "raised", "writes", "scale")
"""Attributes of :class:`Groups` in a saved state."""


class Cached(NamedTuple):
    """Tuned values of a block, by name: numbers where all of its tensors agree.

    Attributes:
        values: Values; one for each weight if tensors differ.
        slopes: Their derivatives w.r.t. raw values.
        tensor_values: Values; one for each tensor if tensors differ.
        tensor_slopes: Their derivatives w.r.t. raw values.
    """

    values: dict[str, Any]
    slopes: dict[str, Any]
    tensor_values: dict[str, Any]
    tensor_slopes: dict[str, Any]


def _each(values: Sequence[float], block: Block) -> float | Tensor:
    if all(v == values[0] for v in values):
        return values[0]
    return torch.tensor(values, dtype=block.layout.dtype, device=block.layout.device)


class Groups:
    """Writes tuned values to parameter groups, and reads values written by others.

    Once a torch scheduler is attached (it sets ``initial_lr``), a group's ``lr`` belongs to the
    scheduler, and the tuned factor multiplies it internally. Any other value written from outside
    becomes the current value. Without a scheduler a tuned ``lr`` is the rate of the last step: the
    tuned peak ``peak_lr`` times the factor of the schedule. ``applied_lr`` is the rate of the last
    step in every case.

    Attributes:
        annealed: Whether a torch scheduler has lowered a rate.
        raised: Whether a torch scheduler has raised a rate, as in a warm-up, or a rate was written
            from outside since the first step.
        writes: How often rates have been written from outside since the first step.
        scale: Factor of a rate that is not tuned and belongs to a torch scheduler; the choice of a
            rule sets it, because many schedulers store their starting values privately.
    """

    def __init__(self, update: Update, shifts: Shifts) -> None:
        self._update = update
        self._shifts = shifts
        self._params: list[Tensor] = []
        self._spans: dict[int, slice] = {}
        self._shown: dict[str, dict[int, float]] = {n: {} for n in shifts.rows}
        self._scheduled: dict[int, float] = {}
        self._factors: dict[int, float] = {}  # of the peaks, at the last step
        self._cached: list[Cached] = []
        self._seen: dict[int, float] = {}  # last rate of a torch scheduler
        self.annealed = self.raised = False
        self.writes = 0
        self.scale = 1.0

    @property
    def tuned(self) -> bool:
        """Whether groups have tuned values."""
        return bool(self._shifts.rows)

    @property
    def laid_out(self) -> bool:
        """Whether start values were read."""
        return bool(self._spans)

    def scale_of(self, group: Group) -> float:
        """The factor of a group's ``lr`` in addition to the schedule's."""
        return self.scale if "initial_lr" in group and "lr" not in self._shifts.rows else 1.0

    def _peak(self, group: Group) -> float:
        """The rate of a group without tuning, at its peak under a torch scheduler."""
        rate = LR.read(group)
        known: Any = group.get("max_lr", group.get("initial_lr", rate))  # of OneCycleLR, or others
        return max(rate, float(known)) * self.scale_of(group)

    def lay_out(self, groups: Sequence[Group], trained: Sequence[Sequence[Tensor]]) -> None:
        """Read start values from the groups; known parameters keep theirs.

        The options of a new group are the start values of its parameters, as if they had been there
        from the first step. Parameters added to an existing group get its current values.
        """
        known = {id(p): at for at, p in enumerate(self._params)}
        self._params = [p for params in trained for p in params]
        owner = [i for i, params in enumerate(trained) for _ in params]
        siblings = [self._spans[i].start if i in self._spans else None for i in owner]
        values: dict[str, list[float]] = {}
        for name, tuned in self._shifts.rows.items():
            present = {i: _mean(tuned.values()[s].tolist()) for i, s in self._spans.items()}
            values[name] = [
                present[i] if i in present else self._start(name, tuned, groups[i]) for i in owner
            ]
        ends = itertools.pairwise(itertools.accumulate(map(len, trained), initial=0))
        self._spans = {i: slice(*both) for i, both in enumerate(ends) if trained[i]}
        places = [known.get(id(p)) for p in self._params]
        self._shifts.lay_out(values, owner, places, siblings)

    def _start(self, name: str, tuned: Scoped, group: Group) -> float:
        scheduled = name == "lr" and "initial_lr" in group
        return float(group["initial_lr"]) if scheduled else tuned.hparam.read(group)

    def present(self, groups: Sequence[Group], *, constant: bool = False) -> dict[str, Any]:
        """Current values of all hyperparameters; a list if groups or tensors differ.

        If ``constant``, lists keep their length when the values in them become equal, as in the
        log; they have one value for each group or tensor with a shift of its own.
        """
        common: dict[str, Any] = {}
        for name, hparam in self._update.hparams.items():
            scope = "run"
            if name in self._shifts.rows and self._spans:
                values = self._shifts.rows[name].values().tolist()
                scope = self._shifts.rows[name].scope if constant else scope
                parts = [values[span] for span in self._spans.values()]
                if scope != "tensor" and all(min(part) == max(part) for part in parts):
                    values = [part[0] for part in parts]
            else:
                fixed_rate = name == "lr" and name not in self._shifts.rows
                values = [self._peak(g) if fixed_rate else hparam.read(g) for g in groups]
            alike = len(values) == 1 or (scope == "run" and all(v == values[0] for v in values))
            common[name] = values[0] if alike else values
        return common

    def cache(self, groups: Sequence[Group], blocks: Sequence[Block]) -> list[Cached]:
        """Prepare tuned values for the steps of each block."""
        for hparam in self._update.heavy:
            self._shifts.memory = 1 / (1 - max(hparam.read(groups[i]) for i in self._spans))
        self._cached = [Cached({}, {}, {}, {}) for _ in self._spans]
        for name, tuned in self._shifts.rows.items():
            values, slope = tuned.values().tolist(), tuned.slopes().tolist()
            for cached, block, span in zip(self._cached, blocks, self._spans.values(), strict=True):
                cached.values[name] = block.layout.expand(values[span])
                cached.slopes[name] = block.layout.expand(slope[span])
                cached.tensor_values[name] = _each(values[span], block)
                cached.tensor_slopes[name] = _each(slope[span], block)
        return self._cached

    def publish(self, groups: Sequence[Group], blocks: Sequence[Block]) -> list[Cached]:
        """Write tuned values to the groups, then ``cache``."""
        for name, tuned in self._shifts.rows.items():
            values = tuned.values().tolist()
            for i, span in self._spans.items():
                group, mean = groups[i], _mean(values[span])
                if name == "lr":
                    group["peak_lr"] = mean
                    mean *= self._factors.get(i, 1.0)
                    if "initial_lr" in group:
                        continue
                if not self._same(name, i, mean):
                    tuned.hparam.write(group, mean)
                self._shown[name][i] = tuned.hparam.read(group)
        return self.cache(groups, blocks)

    def show_rates(self, groups: Sequence[Group], factors: Sequence[float], step: int) -> None:
        """Write the learning rates of a step to the groups.

        ``factors`` multiply the peak of every block, by schedule or sweep; ``step`` counts from 0.
        """
        tuned = self._shifts.rows.get("lr")
        peaks = None if tuned is None else tuned.values().tolist()
        for (i, span), factor in zip(self._spans.items(), factors, strict=True):
            group = groups[i]
            peak = LR.read(group) if peaks is None else _mean(peaks[span])
            factor *= inverse_time(DECAY.read(group), step)
            group["peak_lr"] = self._peak(group) if peaks is None else peak
            group["applied_lr"] = peak * factor
            if tuned is None or "initial_lr" in group:
                continue
            self._factors[i] = factor
            tuned.hparam.write(group, peak * factor)
            self._shown["lr"][i] = tuned.hparam.read(group)

    def _same(self, name: str, index: int, value: float) -> bool:
        """Whether the group already has a value, up to rounding of the inverse scale."""
        shown = self._shown[name].get(index)
        if shown is None:  # at first, keep the user's exact number
            shown = self._shifts.rows[name].start[self._spans[index].start]
        return abs(shown - value) <= 1e-14 * abs(value)

    def check(self, groups: Sequence[Group]) -> None:
        """Raise an error for values outside their range that were written before the first step."""
        for group in groups:
            for hparam in self._update.hparams.values():
                if hparam.role != "rate" or hparam.read(group) != 0:  # 0 freezes the weights
                    check_option(hparam, group)

    def take_up(self, groups: Sequence[Group]) -> bool:
        """Read values written to the groups from outside; return whether there were any."""
        written, scheduled = [], []
        for name, tuned in self._shifts.rows.items():
            for i, span in self._spans.items():
                group, shown = groups[i], self._shown[name].get(i)
                if name == "lr" and "initial_lr" in group:
                    scheduled.append((i, span, group))
                    continue
                value = tuned.hparam.read(group)
                if shown is not None and value != shown:
                    if value != 0:  # a rate of 0 freezes the weights
                        check_option(tuned.hparam, group)
                    written.append((name, i, value, shown))
        for name, i, value, shown in written:
            span = self._spans[i]
            self._shifts.rows[name].rebase(range(span.start, span.stop), value, shown)
            self._shown[name][i] = value
        if any(name == "lr" and i in self._factors for name, i, *_ in written):
            self.raised = True
            self.writes += 1
        changed = [self._take_scheduler(*each) for each in scheduled]
        return bool(written) or any(changed)

    def _take_scheduler(self, index: int, span: slice, group: Group) -> bool:
        initial = float(group["initial_lr"])
        if self._scheduled.get(index) == initial:
            return False
        tuned = self._shifts.rows["lr"]
        # A group laid out after its scheduler has started from the initial rate already.
        shown = self._shown["lr"].get(index, initial or float(tuned.values()[span.start]))
        if initial > 0 and abs(shown - initial) > 1e-14 * initial:
            tuned.rebase(range(span.start, span.stop), initial, shown)
            shown = initial
        self._scheduled[index] = initial
        self._shown["lr"][index] = shown
        return True

    def rates(self, groups: Sequence[Group], factor: float) -> list[float]:
        """The schedule's factor for every block, times that of a torch scheduler."""
        rates = []
        for i in self._spans:
            group = groups[i]
            if "lr" in self._shifts.rows and "initial_lr" in group:
                rate = float(group["lr"])
                last = self._seen.get(i, rate)
                self.annealed = self.annealed or rate < last
                self.raised = self.raised or rate > last
                self._seen[i] = rate
                rates.append(factor * rate / self._shown["lr"][i])
            else:
                rates.append(factor * self.scale_of(group))
        return rates

    def options(self, group: Group) -> Group:
        return {**group, **{n: h.read(group) for n, h in self._update.hparams.items()}}

    def values(self, groups: Sequence[Group]) -> list[Group]:
        """Options and current hyperparameters of every block."""
        return [
            {**self.options(groups[i]), **cached.values, "index": i}
            for i, cached in zip(self._spans, self._cached, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.deepcopy(vars(self)[name]) for name in SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: copy.deepcopy(state[name]) for name in SAVED})


def _mean(values: Sequence[float]) -> float:
    """The mean over a group's tensors, which usually agree."""
    return values[0] if min(values) == max(values) else sum(values) / len(values)
