"""A tuned trajectory as plain data, and its replay on any torch optimizer.

The file is JSON and can be used without this library::

    schedule = json.load(open("schedule.json"))
    for step in range(schedule["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = value("lr", step)     # the last entry of values["lr"] not after step
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selftune._arguments import COUNT, MAPPING, TEXT, Number, Whole, check
from selftune._files import write_text
from selftune.nn import Tunable
from selftune.rules.adam import BETA1, BETA2

FORMAT = "selftune schedule 1"
OPTIONS = {h.name: (h.option, int(h.index or 0)) for h in (BETA1, BETA2)}
"""Hyperparameters that are elements of a tuple in a parameter group."""


@dataclass(frozen=True, kw_only=True)
class TunedSchedule:
    """The value of every hyperparameter at every step of a run.

    Attributes:
        rule: Name of the update rule (``"AdamW"``).
        steps: Length of the run.
        values: Pairs (first step, value) for each hyperparameter, each valid until the next.
            The learning rate includes its schedule and decay.

    Examples:
        >>> schedule = TunedSchedule(rule="SGD", steps=4, values={"lr": [[0, 0.1], [2, 0.05]]})
        >>> schedule.at(1), schedule.at(3)
        ({'lr': 0.1}, {'lr': 0.05})
    """

    rule: str
    steps: int
    values: Mapping[str, Sequence[Sequence[float]]]
    format: str = field(default=FORMAT, kw_only=True)

    def __post_init__(self) -> None:
        check({"rule": TEXT, "steps": COUNT, "values": MAPPING}, vars(self))
        if self.format != FORMAT:
            raise ValueError(f"format={self.format!r} must be {FORMAT!r}")
        for name, entries in self.values.items():
            firsts = [first for first, _ in entries]
            if not firsts or firsts != sorted(firsts):
                raise ValueError(f"values[{name!r}] must be pairs (first step, value) in order")
            for first, value in entries:
                check({f"values[{name!r}] from step {first}": Number()},
                      {f"values[{name!r}] from step {first}": value})  # fmt: skip
                check({f"values[{name!r}]: first step": Whole()},
                      {f"values[{name!r}]: first step": first})  # fmt: skip

    def at(self, step: int) -> dict[str, float]:
        """All hyperparameters at a step counted from 0; past the end, the last ones."""
        values = {}
        for name, entries in self.values.items():
            place = bisect_right([first for first, _ in entries], step)
            values[name] = entries[max(place - 1, 0)][1]
        return values

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON.

        Raises:
            OSError: The file cannot be written; a previous file is kept.
        """
        write_text(Path(path), json.dumps(asdict(self)))

    @staticmethod
    def load(path: str | PathLike[str]) -> TunedSchedule:
        """Read a file written by ``save``.

        Raises:
            ValueError: The file is not a schedule.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            return TunedSchedule(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a schedule saved by selftune ({error}): pass another "
                "file, or save the schedule of the run again"
            ) from error


class Replay:
    """Sets a torch optimizer's hyperparameters step by step, like an LR scheduler.

    See :func:`replay`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: TunedSchedule,
        ignore: Iterable[str],
        model: nn.Module | None,
    ) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        modules = [] if model is None else model.modules()
        layers = [m for m in modules if isinstance(m, Tunable)]
        wanted = [n for n in schedule.values if n not in set(ignore)]
        self._layers = [m for m in layers if m.hparam.name in wanted]
        strengths = {m.hparam.name for m in self._layers}
        self._names = []
        for name in [n for n in wanted if n not in strengths]:
            key = OPTIONS.get(name, (name,))[0]
            if all(key in group for group in optimizer.param_groups):
                self._names.append(name)
            elif any(value for _, value in schedule.values[name]):  # a term of 0 is none
                raise ValueError(
                    f"schedule tunes {name!r}, which {type(optimizer).__name__} does not have: "
                    f"use the optimizer it was tuned for ({schedule.rule}), pass model= if it is "
                    f"the strength of a layer, add the term to the loss yourself, or pass "
                    f"ignore=({name!r},)"
                )
        self.last_step = 0
        self._write()

    def step(self) -> None:
        """Set the values of the next training step; call it after ``optimizer.step()``."""
        self.last_step += 1
        self._write()

    def _write(self) -> None:
        values = self._schedule.at(self.last_step)
        for layer in self._layers:
            layer.strength.fill_(values[layer.hparam.name])
        for group in self._optimizer.param_groups:
            for name in self._names:
                key, *place = OPTIONS.get(name, (name,))
                if place:
                    pair = list(group[key])
                    pair[place[0]] = values[name]
                    group[key] = tuple(pair)
                elif isinstance(group[key], torch.Tensor):
                    group[key].fill_(values[name])
                else:
                    group[key] = values[name]

    def state_dict(self) -> dict[str, Any]:
        """The current step."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.last_step = state["last_step"]
        self._write()


def replay(
    optimizer: torch.optim.Optimizer,
    schedule: TunedSchedule | str | PathLike[str],
    ignore: Iterable[str] = (),
    model: nn.Module | None = None,
) -> Replay:
    """Apply a tuned trajectory to a plain torch optimizer.

    Args:
        optimizer: Any torch optimizer with the tuned hyperparameters; all groups get equal values.
        schedule: ``TuningResult.schedule``, or the file it was saved to.
        ignore: Names of hyperparameters to ignore.
        model: Model with layers of :mod:`selftune.nn`, whose strengths are set too.

    Returns:
        An object whose ``step()`` is called after each ``optimizer.step()``.

    Raises:
        ValueError: The optimizer lacks a tuned hyperparameter, or the file is not a schedule.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> follow = replay(
        ...     optimizer, TunedSchedule(rule="SGD", steps=2, values={"lr": [[0, 0.1], [1, 0.2]]})
        ... )
        >>> follow.step()
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """
    loaded = schedule if isinstance(schedule, TunedSchedule) else TunedSchedule.load(schedule)
    return Replay(optimizer, loaded, ignore, model)
