"""Files that are damaged, on disks that are full or read-only, or that two processes write."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.reliability.damage import DAMAGES, other
from benchmarks.reliability.disks import crowded, stuck
from benchmarks.reliability.kills import net
from benchmarks.reliability.processes import apart, scratch, warm_up
from benchmarks.reliability.uses import TARGETS, Case, Truth, make

READ_BY_THE_USER = ("torch/serialization.py", "torch/_weights_only_unpickler.py")
"""Where an error comes from if a loop's own file cannot be read at all."""


def damaged() -> Iterator[Case]:
    """Every file with every damage."""
    for file, (pattern, use, names) in TARGETS.items():
        for at, damage in enumerate(DAMAGES):
            mine = file == "optimizer state"

            def harm(place: Path, file: str = file, at: int = at, pattern: str = pattern) -> None:
                path = sorted(p for p in place.glob(pattern) if not p.name.endswith(".end"))[-1]
                if file == "optimizer state" and DAMAGES[at] is other:
                    plain_state(path)
                else:
                    DAMAGES[at](path, random.Random(f"{file} {at}"))

            yield Case(file, damage.__name__, names, use, harm,
                       foreign=READ_BY_THE_USER if mine else ())  # fmt: skip


def plain_state(path: Path) -> None:
    """A loop's file with the state of a plain torch optimizer in it."""
    model, saved = net(), torch.load(path, weights_only=True)
    plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.save({**saved, "opt": plain.state_dict()}, path)


def cases() -> list[Case]:
    """All of them."""
    return [*damaged(), *stuck(), *crowded()]


def files(count: int) -> list[tuple[Case, str]]:
    """So many cases, spread over all kinds, and what is wrong with each."""
    every = cases()
    chosen = [every[i * len(every) // count] for i in range(count)]
    with scratch() as place:
        truth = apart(partial(make, place / "files"))
        warm_up(partial(_everything, place / "files", place / "warm", truth))
        return [(case, case.verdict(place / "files", truth)) for case in chosen]


def _everything(origin: Path, place: Path, truth: Truth) -> None:
    shutil.copytree(origin, place)
    for file, (_, use, _) in TARGETS.items():
        wrong = use(place, truth, [])
        assert not wrong, f"undisturbed {file}: {wrong}"
