"""What steps tell: read in blocks, noted, judged and shown."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selftune.bilevel import Bilevel, Run
from selftune.guard import Guard
from selftune.hparams import MOMENTA
from selftune.monitor import Verdict
from selftune.tuner._good import Good
from selftune.tuner._result import History
from selftune.tuner._telling import Telling

log = logging.getLogger("selftune")

YOUNG = 200  # steps in which a network may be found dead
LOOK = 0.2  # seconds between two looks at the progress bar's text


class Watch:
    """Keeps the history of a run, shows it, and brings the run back when it goes wrong.

    Args:
        bilevel: The steps.
        run: Their tensors.
        good: The last good weights.
        members: Size of a population, or None.
        guarded: Whether a run that goes wrong is brought back.
        due: Whether something is to be logged at a hyperparameter step.
        rest: Seconds from one entry in the log to the next, at least.
        compare: A member's losses at the average and at the good weights, over many batches.

    Attributes:
        history: The course so far.
        guarded: Whether a run that goes wrong is brought back.
        guards: One for each member.
        since: The step after which hyperparameter steps are counted.
        leader: The member with the lowest recent validation loss.
        telling: The log.
        bar: The progress bar.
    """

    def __init__(
        self,
        bilevel: Bilevel,
        run: Run,
        good: Good,
        members: int | None,
        guarded: bool,
        due: Callable[[int], bool],
        rest: float,
        compare: Callable[[int], tuple[float, float]],
    ) -> None:
        self.history = History()
        self.guards = [Guard() for _ in range(members or 1)]
        self.since = self.leader = 0
        self.telling = Telling(bilevel, run, good, self.history, rest)
        self.bar: tqdm[Any] = tqdm(disable=True)
        self._bilevel, self._run, self._good = bilevel, run, good
        self._many, self.guarded, self._due = members is not None, guarded, due
        self._compare = compare
        self._kept_at = [0] * len(self.guards)  # steps after which weights were good …
        self._held_at = [0] * len(self.guards)  # … or are to be found good
        self._losses: list[Tensor] = []
        self._told: list[tuple[int, Tensor]] = []
        self._looked = 0.0

    def trained(self, loss: Tensor) -> None:
        """Take the loss of a training step, unread."""
        self._losses.append(_kept(loss))

    def tuned(self, step: int, told: Tensor) -> None:
        """Take what a hyperparameter step told; a GPU is waited for only if a log entry is due."""
        self._told.append((step, _kept(told)))
        if not told.is_cuda or self._due(step):
            self.digest(step)

    def digest(self, step: int) -> None:
        """Read what steps told since last time, and act on it."""
        losses, self._losses = self._losses, []
        told, self._told = self._told, []
        plain, rows = _read(losses), _read([t for _, t in told])
        if not self._many:
            rows = [[row] for row in rows]
        start = len(self.history.train_loss)
        self.history.train_loss += [min(row) for row in plain] if self._many else plain
        found = [(at, row) for (at, _), row in zip(told, rows, strict=True)]
        for at, members in found:
            self._note_tuned(at, members)
        self.bar.update(step - self.bar.n)
        if self.guarded:
            self._judge(step, self.history.train_loss[start:], found)

    def _note_tuned(self, step: int, members: list[list[float]]) -> None:
        self.leader = min(range(len(members)), key=self._standing)
        loss, outer, _, *values = members[self.leader]
        self.history.train_loss.insert(step - 1, loss)
        named = dict(zip(self._bilevel.hyper.names, values, strict=True))
        self.history.hyper(step, outer, named)
        self._show(step, loss, outer, named)

    def _standing(self, member: int) -> float:
        """A member's recent validation loss, for ranking."""
        mean = self.guards[member].mean
        return mean if math.isfinite(mean) else math.inf

    def _show(self, step: int, loss: float, outer: float, values: dict[str, float]) -> None:
        """The log and the progress bar, no more often than they are looked at."""
        if self._due(step):
            self.telling.tuned(step, loss, outer, values, self.leader, self._standing(self.leader))
        now = time.monotonic()
        if now - self._looked > LOOK:
            self._looked = now
            shown = {n: f"{v:.2g}" for n, v in values.items()}
            self.bar.set_postfix(loss=f"{loss:.3f}", val=f"{outer:.3f}", **shown, refresh=False)

    # going wrong, and back

    def keep(self, step: int, member: int) -> None:
        """Remember the present averaged weights as good."""
        self._good.keep(member)
        self._kept_at[member] = step

    def _judge(self, step: int, losses: list[float], told: list[tuple[int, Any]]) -> None:
        for loss in losses if not self._many else []:
            if self.guards[0].training_loss(loss) == "rollback":
                why = "the training loss exploded or is not finite"
                self._roll_back(step, 0, why, worsened=False)
                return
        for at, members in told:
            for member, row in enumerate(members):
                self._judge_member(step, member, at, row[1], row[2])

    def _judge_member(self, step: int, member: int, at: int, outer: float, alive: float) -> None:
        guard = self.guards[member]
        if at - self.since <= YOUNG and guard.pulse(alive) == "rollback":
            self._roll_back(step, member, "gradients vanished", worsened=False)
            return
        verdict = guard.loss(outer)
        if verdict == "hold":
            self._good.hold(member)
            self._held_at[member] = step
        elif verdict == "best":
            self._good.keep(member, held=True)
            self._kept_at[member] = self._held_at[member]
        elif verdict == "rollback" and (
            not math.isfinite(outer) or guard.confirms(*self._compare(member))
        ):
            what = "exploded" if guard.exploded else "worsened"
            why = f"the validation loss has {what}, to {outer:.4g}"
            self._roll_back(step, member, why, worsened=not guard.exploded)

    @torch.no_grad()
    def _roll_back(self, step: int, member: int, why: str, *, worsened: bool) -> None:
        """Return to the last good weights with a lower rate, as the optimizers' engine does."""
        guard, hyper = self.guards[member], self._bilevel.hyper
        cool = guard.rolled_back(worsened=worsened)
        self._good.rewind(member)
        raw = self._good.part(self._run.hyper.raw, member)
        state = hyper.move(self._run.hyper._replace(raw=raw), "lr", -cool)
        for name in () if worsened else MOMENTA:
            state = hyper.move(state, name, -0.7)  # memory 1/(1 − μ) about halves
        raw.copy_(state.raw)
        if not self._many:
            self.since = step
        (log.warning if guard.rollbacks == 1 else log.info)(
            "selftune, step %d: %s; back to the last good weights, learning rate %s",
            step, why, f"divided by {math.exp(cool):.3g}" if "lr" in hyper.names
            else "unchanged, since it is not tuned",
        )  # fmt: skip
        self.history.rollbacks.append(step)
        self.telling.monitor.scalar("guard/events", len(self.history.rollbacks), step)
        if not self._many:
            self.history.undone.append([self._kept_at[member], step])
            self._kept_at[member] = step
        self.note(step)

    # the present hyperparameters

    def verdicts(self) -> dict[str, Verdict]:
        """What has become of each tuned hyperparameter so far."""
        return self.telling.verdicts(self.leader)

    def _tuned_values(self) -> dict[str, float]:
        raw = self._good.part(self._run.hyper.raw, self.leader)
        return {n: float(v) for n, v in self._bilevel.hyper.values(raw).items()}

    def note(self, step: int) -> None:
        """Note hyperparameters that something else than a hyperparameter step has set."""
        values = self._tuned_values()
        self.history.hyper(step, math.nan, values)
        self.telling.monitor.scalars([(f"hyper/{n}", v) for n, v in values.items()], step)

    def hparams(self) -> dict[str, float]:
        """All hyperparameters as they are now; the learning rate is the tuned peak."""
        tuned, fixed = self._tuned_values(), self._bilevel.options
        update = {n: tuned.get(n, fixed.get(n, 0.0)) for n in self._bilevel.update.hparams}
        return update | {n: v for n, v in tuned.items() if n in self._bilevel.strengths}

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to go on."""
        return {
            "history": dict(vars(self.history)),
            "guards": [g.state_dict() for g in self.guards],
            "since": self.since,
            "leader": self.leader,
            "kept_at": self._kept_at,
            "held_at": self._held_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        vars(self.history).update(state["history"])  # others hold it too
        for guard, saved in zip(self.guards, state["guards"], strict=True):
            guard.load_state_dict(saved)
        self.since, self.leader = state["since"], state["leader"]
        self._kept_at, self._held_at = state["kept_at"], state["held_at"]


def _read(tensors: list[Tensor]) -> list[Any]:
    """Their values; from a GPU in one piece, which is waited for once."""
    if tensors and tensors[0].is_cuda:
        return torch.stack(tensors).tolist()
    return [t.tolist() for t in tensors]


def _kept(told: Tensor) -> Tensor:
    """What a step returned; a CUDA graph writes over it at the next."""
    return told.clone() if told.is_cuda else told
