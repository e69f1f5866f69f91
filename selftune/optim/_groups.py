"""Between torch's parameter groups and the tuned hyperparameters: who may write what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selftune.hparams import Tuned
from selftune.optim._block import Block
from selftune.optim._checks import check_option
from selftune.tuning import Tuning
from selftune.update import Update

Group = dict[str, Any]


class Groups:
    """Shows tuned values in parameter groups, and takes up what others write there.

    Once a torch scheduler is attached (it leaves ``initial_lr``), a group's ``lr`` is the
    scheduler's to write: it starts from the scheduler's value, and the tuned factor multiplies
    it unseen. Any other value that is written from outside becomes the present value.

    Args:
        update: Names and scales of all hyperparameters.
        tuning: The tuned ones.
    """

    def __init__(self, update: Update, tuning: Tuning) -> None:
        self._update = update
        self._tuning = tuning
        self._params: list[Tensor] = []
        self._spans: dict[int, slice] = {}
        self._shown: dict[str, dict[int, float]] = {n: {} for n in tuning.rows}
        self._scheduled: dict[int, float] = {}
        self._cached: list[dict[str, Any]] = []

    def lay_out(self, groups: Sequence[Group], trained: Sequence[Sequence[Tensor]]) -> None:
        """Take start values from the groups; parameters known already keep theirs."""
        known = {id(p): at for at, p in enumerate(self._params)}
        self._params = [p for params in trained for p in params]
        owner = [i for i, params in enumerate(trained) for _ in params]
        start, self._spans = 0, {}
        for i, params in enumerate(trained):
            if params:
                self._spans[i] = slice(start, start + len(params))
            start += len(params)
        values = {
            name: [self._start(name, tuned, groups[i]) for i in owner]
            for name, tuned in self._tuning.rows.items()
        }
        self._tuning.lay_out(values, owner, [known.get(id(p)) for p in self._params])

    def _start(self, name: str, tuned: Tuned, group: Group) -> float:
        scheduled = name == "lr" and "initial_lr" in group
        return float(group["initial_lr"]) if scheduled else tuned.hparam.read(group)

    def told(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Present values of all hyperparameters; a list of groups', or tensors', that differ."""
        found: dict[str, Any] = {}
        for name, hparam in self._update.hparams.items():
            if name in self._tuning.rows:
                values = self._tuning.rows[name].values().tolist()
                parts = [values[span] for span in self._spans.values()]
                if all(min(part) == max(part) for part in parts):
                    values = [part[0] for part in parts]
            else:
                values = [hparam.read(g) for g in groups]
            found[name] = values[0] if all(v == values[0] for v in values) else values
        return found

    def cache(self, groups: Sequence[Group], blocks: Sequence[Block]) -> list[dict[str, Any]]:
        """Make tuned values ready for the steps; returns their slopes by block."""
        if "momentum" in self._update.hparams:
            momentum = self._update.hparams["momentum"]
            self._tuning.memory = 1 / (1 - max(momentum.read(groups[i]) for i in self._spans))
        self._cached = [{} for _ in self._spans]
        slopes: list[dict[str, Any]] = [{} for _ in self._spans]
        for name, tuned in self._tuning.rows.items():
            values, slope = tuned.values().tolist(), tuned.slopes().tolist()
            for at, span in enumerate(self._spans.values()):
                self._cached[at][name] = blocks[at].layout.expand(values[span])
                slopes[at][name] = blocks[at].layout.expand(slope[span])
        return slopes

    def publish(self, groups: Sequence[Group], blocks: Sequence[Block]) -> list[dict[str, Any]]:
        """Show tuned values in the groups, then ``cache``."""
        for name, tuned in self._tuning.rows.items():
            values = tuned.values().tolist()
            for i, span in self._spans.items():
                group, mine = groups[i], values[span]
                if name == "lr" and "initial_lr" in group:
                    continue
                mean = mine[0] if min(mine) == max(mine) else sum(mine) / len(mine)
                if not self._same(name, i, mean):
                    tuned.hparam.write(group, mean)
                self._shown[name][i] = tuned.hparam.read(group)
        return self.cache(groups, blocks)

    def _same(self, name: str, index: int, value: float) -> bool:
        """Whether the group shows a value already, up to a rounding of the scale's inverse."""
        shown = self._shown[name].get(index)
        if shown is None:  # the first time: the user's own number stands
            shown = self._tuning.rows[name].start[self._spans[index].start]
        return abs(shown - value) <= 1e-14 * abs(value)

    def take_up(self, groups: Sequence[Group]) -> bool:
        """Take over what was set in the groups from outside; whether anything was.

        Raises:
            ValueError: A value outside its range; none is taken over then.
        """
        written, scheduled = [], []
        for name, tuned in self._tuning.rows.items():
            for i, span in self._spans.items():
                group, shown = groups[i], self._shown[name].get(i)
                if name == "lr" and "initial_lr" in group:
                    scheduled.append((i, span, group))
                    continue
                value = tuned.hparam.read(group)
                if shown is not None and value != shown:
                    if value != 0:  # a rate of 0 holds the weights
                        option = tuned.hparam.option or name
                        check_option(option, group[option])
                    written.append((name, i, value, shown))
        for name, i, value, shown in written:
            span = self._spans[i]
            self._tuning.rows[name].rebase(range(span.start, span.stop), value, shown)
            self._shown[name][i] = value
        heard = [self._hear_scheduler(*each) for each in scheduled]
        return bool(written) or any(heard)

    def _hear_scheduler(self, index: int, span: slice, group: Group) -> bool:
        initial = float(group["initial_lr"])
        if self._scheduled.get(index) == initial:
            return False
        tuned = self._tuning.rows["lr"]
        shown = self._shown["lr"].get(index, float(tuned.values()[span.start]))
        if initial > 0 and abs(shown - initial) > 1e-14 * initial:
            tuned.rebase(range(span.start, span.stop), initial, shown)
            shown = initial
        self._scheduled[index] = initial
        self._shown["lr"][index] = shown
        return True

    def rates(self, groups: Sequence[Group], factor: float) -> list[float]:
        """Our schedule's factor for every block, times that of a torch scheduler."""
        rates = []
        for i in self._spans:
            group = groups[i]
            if "lr" in self._tuning.rows and "initial_lr" in group:
                rates.append(factor * float(group["lr"]) / self._shown["lr"][i])
            else:
                rates.append(factor)
        return rates

    def options(self, group: Group) -> Group:
        """A group's options with all hyperparameters as numbers."""
        return {**group, **{n: h.read(group) for n, h in self._update.hparams.items()}}

    def values(self, groups: Sequence[Group]) -> list[Group]:
        """Options and present hyperparameters of every block."""
        return [
            {**self.options(groups[i]), **tuned, "index": i}
            for i, tuned in zip(self._spans, self._cached, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What was shown, and what schedulers started from."""
        shown = {n: dict(v) for n, v in self._shown.items()}
        return {"shown": shown, "scheduled": dict(self._scheduled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._shown = {n: dict(v) for n, v in state["shown"].items()}
        self._scheduled = dict(state["scheduled"])
