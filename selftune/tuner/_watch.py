"""Outputs of the steps: read in blocks, recorded, displayed, and passed to the controllers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selftune.control import (
    Action,
    Activity,
    Controller,
    Gradient,
    Hypergradient,
    TrainingLoss,
    ValidationLoss,
)
from selftune.monitor import Course, Metrics, Verdict
from selftune.tuner._logging import TunerLog
from selftune.tuner._result import History
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps

LOOK = 0.2  # minimum seconds between updates of the progress bar's text


class Watch:
    """Keeps and displays the history of a run, and carries out its controllers' actions.

    Args:
        snapshots: The last good weights, and the run.
        controllers: One for each member of a population, or one.
        due: Whether a log entry is due at a hyperparameter step.
        rest: Minimum seconds between two log entries.
        compare: Returns a member's losses at the average and at the good weights, over many
            batches.

    Attributes:
        leader: The member with the lowest recent validation loss.
        since: Steps at the last restart of a single run.
        log: The metrics.
    """

    def __init__(
        self,
        steps: Steps,
        snapshots: Snapshots,
        controllers: list[Controller],
        due: Callable[[int], bool],
        rest: float,
        compare: Callable[[int], tuple[float, float]],
    ) -> None:
        self.history, self.controllers = History(), controllers
        self.leader = self.since = 0
        self.log = TunerLog(steps, snapshots, rest)
        self.bar: tqdm[Any] = tqdm(disable=True)
        self._steps, self._run, self._snapshots = steps, snapshots.run, snapshots
        self._due, self._compare = due, compare
        self._good_at = [0] * len(controllers)  # step of each member's last good weights
        self._trained: list[tuple[int, Tensor]] = []
        self._tuned: list[tuple[int, Tensor]] = []
        self._looked = 0.0
        self._last_losses: dict[int, list[list[float]]] = {}  # of the last training steps read

    @property
    def metrics(self) -> Metrics:
        return self.log.metrics

    @property
    def _many(self) -> bool:
        return len(self.controllers) > 1

    def trained(self, step: int, record: Tensor) -> None:
        """Store the outputs of a training step, without reading them."""
        self._trained.append((step, _kept(record)))

    def tuned(self, step: int, record: Tensor) -> None:
        """Store the outputs of a hyperparameter step, without reading them."""
        self._tuned.append((step, _kept(record)))

    def read(self, step: int) -> None:
        """Read at the end of a step; synchronises with a GPU only if a log entry is due."""
        if self._tuned and (not self._tuned[-1][1].is_cuda or self._due(step)):
            self.digest(step)

    def digest(self, step: int) -> None:
        """Read the outputs of steps since the last call, and act on them."""
        trained, self._trained = self._read(self._trained), []
        tuned, self._tuned = self._read(self._tuned), []
        if trained:  # on a CPU a training step is read before its hyperparameter step
            self._last_losses = dict(trained)
        for at, rows in tuned:
            self._note(at, rows)
        self.history.train_loss += [rows[self.leader][0] for _, rows in trained]
        self.bar.update(step - self.bar.n)
        for at, rows in trained:
            later = [self._raw_before(rows) for other, rows in tuned if other >= at]
            actions = [self._judge_step(at, m, row) for m, row in enumerate(rows)]
            if self._act(step, actions, later[0] if later else None):
                return  # later steps are undone
        for _, rows in tuned:
            actions = [self._judge_outer(m, row) for m, row in enumerate(rows)]
            if self._act(step, actions, self._raw_before(rows)) and not self._many:
                return

    def _raw_before(self, rows: list[list[float]]) -> list[list[float]]:
        """Each member's raw hyperparameters before a hyperparameter step."""
        return [row[2 + 2 * len(self._steps.hyper.names) :] for row in rows]

    def _read(self, records: list[tuple[int, Tensor]]) -> list[tuple[int, list[list[float]]]]:
        """Steps and numbers of each member, copied from a GPU at once."""
        tensors = [t for _, t in records]
        values = (
            torch.stack(tensors).tolist()
            if tensors and tensors[0].is_cuda
            else [t.tolist() for t in tensors]
        )
        rows = values if self._many else [[row] for row in values]
        return list(zip([at for at, _ in records], rows, strict=True))

    def _note(self, step: int, rows: list[list[float]]) -> None:
        """Record a hyperparameter step in history, log and progress bar."""
        self.leader = min(range(len(rows)), key=lambda m: self.controllers[m].standing)
        outer, _, *values = rows[self.leader]
        names = self._steps.hyper.names
        named = dict(zip(names, values, strict=False))
        self.history.hyper(step, outer, named)
        self.log.note(values[len(names) : 2 * len(names)])
        self.log.note_floors(named, self.leader)
        known = self._last_losses.get(step)
        loss = math.nan if known is None else known[self.leader][0]
        if self._due(step):
            self.log.hyper_step(step, loss, outer, named, self.leader)
        now = time.monotonic()
        if now - self._looked > LOOK:
            self._looked = now
            shown = {n: f"{v:.2g}" for n, v in named.items()}
            self.bar.set_postfix(loss=f"{loss:.3f}", val=f"{outer:.3f}", **shown, refresh=False)

    # failures and rewinds

    def _judge_step(self, step: int, member: int, row: list[float]) -> Action:
        loss, fine, *alive = row
        controller = self.controllers[member]
        guard = controller.guard
        if guard is None:
            return Action()
        action = controller.observe(Gradient(bool(fine)))
        if action.rewind is None and not self._many:
            action = controller.observe(TrainingLoss(loss))
        stride = self._steps.method.sensitivities.estimator.stride
        age = step - int(self._snapshots.part(self._run.since, member))
        counted = not math.isnan(alive[0]) and guard.policy.counts(age, stride)
        if action.rewind is None and counted:
            action = controller.observe(Activity(alive, age, self._climb(member)))
        return action

    def _climb(self, member: int) -> float:
        """Log of a member's learning rate divided by its initial value."""
        hyper = self._steps.hyper
        if "lr" not in hyper.hparams:
            return 0.0
        raw = self._snapshots.part(self._run.hyper.raw, member)[hyper.slots["lr"]]
        return float(raw) - math.log(self._steps.start["lr"])

    def _judge_outer(self, member: int, row: list[float]) -> Action:
        outer, finite, *_ = row
        controller = self.controllers[member]
        action = controller.observe(ValidationLoss(outer, lambda: self._compare(member)))
        if action.rewind is not None or not math.isfinite(outer):
            return action
        judged = controller.observe(Hypergradient(bool(finite)))
        return judged if judged.rewind is not None else action

    def _act(self, step: int, actions: Sequence[Action], raw: Sequence[list[float]] | None) -> bool:
        """Carry out each member's action; a rewind restores ``raw``, its hyperparameters before."""
        befores: Sequence[list[float] | None] = raw or [None] * len(actions)
        acted = zip(actions, befores, strict=True)
        return any([self._carry_out(step, m, *each) for m, each in enumerate(acted)])

    def _carry_out(self, step: int, member: int, action: Action, raw: list[float] | None) -> bool:
        if action.snapshot:
            self._snapshots.take(action.snapshot, member)
            self._good_at[member] = step
        if action.rewind is None:
            return False
        self._snapshots.rewind(action.rewind, member, raw, diverged=action.diverged)
        self.controllers[member].announce(action, step)
        undone, self._good_at[member] = [self._good_at[member], step], step
        if not self._many:
            self.since = step
        if member == self.leader:  # whose values history and log show
            self.history.rewinds.append(step)
            self.history.undone.append(undone)
            self.metrics.monitor.scalar("weights/rewinds", len(self.history.rewinds), step)
            self.note(step)
            self._mark(action.rewind, step)
        return True

    def copied(self, source: int, member: int) -> None:
        """A member of a population continues as a copy of another."""
        self.controllers[member].guard = copy.deepcopy(self.controllers[source].guard)
        self._good_at[member] = self._good_at[source]

    def _mark(self, names: Iterable[str], step: int) -> None:
        """Mark an event in the charts of the hyperparameters that it changed."""
        present = self._tuned_values()
        self.metrics.mark({n: present[n] for n in names if n in present}, step)

    def close(self, step: int) -> None:
        """Read and show everything up to the end of the run."""
        self.digest(step)
        self.metrics.monitor.flush()
        self.bar.close()

    def begin(self, step: int, *, extended: bool = False) -> None:
        """Record the start of the run, possibly after a sweep, or of an extended one."""
        self.since = step
        self._good_at = [step] * len(self._good_at)
        self.note(step)
        swept = self.controllers[0].swept
        if extended:
            self._mark(["lr"], step)
        elif swept:
            given = {n: v for n, v in self._steps.starts.items() if n in swept}
            self.metrics.mark(given, 0)
            self._mark(swept, step)

    # the present hyperparameters

    def why(
        self, given: Mapping[str, float], schedule: Any, verdicts: Mapping[str, Verdict]
    ) -> str:
        """Explain each hyperparameter's value; for a population, that of its leader."""
        controller = self.controllers[self.leader]
        course = Course(
            given=given, swept=controller.swept, rewinds=controller.rewinds, annealed=schedule,
            hparams=self._steps.hyper.hparams,
        )  # fmt: skip
        known = self.hparams()
        return course.explain({n: known[n] for n in given}, verdicts)

    def verdicts(self) -> dict[str, Verdict]:
        return self.log.verdicts(self.hparams(), self.leader)

    def _tuned_values(self) -> dict[str, float]:
        return {n: float(v) for n, v in self._steps.hyper.values(self._raw()).items()}

    def _raw(self) -> Tensor:
        return self._snapshots.part(self._run.hyper.raw, self.leader)

    def note(self, step: int) -> None:
        """Record hyperparameters set by something other than a hyperparameter step."""
        values = self._tuned_values()
        self.history.hyper(step, math.nan, values)
        self.log.note(self._raw().tolist())
        if self.metrics.monitor.on:
            self.metrics.placed(values, step)

    def hparams(self) -> dict[str, float]:
        """All current hyperparameters; the learning rate is the tuned peak."""
        tuned, fixed = self._tuned_values(), self._steps.options
        update = {n: tuned.get(n, fixed.get(n, 0.0)) for n in self._steps.update.hparams}
        strengths = {n: v for n, v in tuned.items() if n in self._steps.layers}
        return update | dict(self._steps.strengths) | strengths

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": dict(vars(self.history)),
            "controllers": [c.state_dict() for c in self.controllers],
            "leader": self.leader,
            "since": self.since,
            "good_at": self._good_at,
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.history).update(state["history"])  # in place, because it is shared
        for controller, saved in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(saved)
        self.leader, self.since = state["leader"], state["since"]
        self._good_at = state["good_at"]
        self.metrics.load_state_dict(state["metrics"])


def _kept(record: Tensor) -> Tensor:
    """A copy of a step's outputs, which a CUDA graph overwrites at the next step."""
    return record.clone() if record.is_cuda else record
