"""Runs that SIGKILL meets at a random moment, and that go on from their last checkpoint.

A run is killed once or twice and then ends. Truth: the same run, which nobody killed: weights,
hyperparameters and losses at its end, and every point of its curves as TensorBoard reads them.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st
from benchmarks.reliability.processes import Broken, Child, apart, scratch, warm_up

Curves = dict[str, list[tuple[int, float]]]
Job = Callable[[int, Path], str]

EPOCHS, SAVES = 8, (1, 4)
"""Length of a run, and epochs from one checkpoint to the next."""
CLOCKS = ("time/",)
"""Curves of times, which differ from run to run."""


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three noisy classes of points in the plane."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=draw)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[targets] + torch.randn(count, 2, generator=draw), targets


def batches(count: int, seed: int) -> DataLoader[Any]:
    """Shuffled by torch's random stream."""
    return DataLoader(TensorDataset(*points(count, seed)), batch_size=20, shuffle=True)


def net() -> nn.Module:
    """One with random streams and statistics."""
    return nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def digest(tree: Any) -> str:
    """Of tensors, arrays and numbers, bit for bit."""
    found = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                add(f"{name}/{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for at, part in enumerate(value):
                add(f"{name}/{at}", part)
        elif isinstance(value, Tensor):
            add(name, value.detach().numpy())
        else:
            data = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
            found.update(name.encode() + data)

    add("", tree)
    return found.hexdigest()


def tuned(save: int, folder: Path, stop: int | None = None) -> str:
    """A run of the tuner with everything random in it, begun or gone on with, perhaps stopped."""

    def look(progress: Any) -> None:
        if stop is not None and progress.step >= stop:
            raise KeyboardInterrupt

    torch.manual_seed(3)
    tuner = st.Tuner(
        net(), F.cross_entropy, rule=st.rules.SGD(), hparams={"lr": 0.01, "momentum": 0.9},
        compile=False,
    )  # fmt: skip
    result = tuner.fit(
        batches(205, 0), batches(60, 1), epochs=EPOCHS, log_dir=folder, log_every=5,
        evaluate_every=11, checkpoint_every=11 * save, resume=True, progress=False,
        callbacks=[look],
    )  # fmt: skip
    schedule = result.schedule.values
    return digest([result.history, result.best_weights, schedule, result.hparams, result.best_loss])


def looped(shell: str, save: int, folder: Path, stop: int | None = None) -> str:
    """A loop of one's own, which saves as torch users do and begins anew where nothing is saved."""
    torch.manual_seed(3)
    model = net()
    train, val = batches(205, 0), batches(60, 1)
    options = {"momentum": 0.9} if shell == "SGD" else {}
    total = EPOCHS * len(train)
    opt = getattr(st, shell)(model, lr=0.01, total_steps=total, log_dir=folder, **options)
    path, partial_path, step = folder / "saved.pt", folder / "saved.tmp", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["net"])
        opt.load_state_dict(saved["opt"])
        torch.set_rng_state(saved["random"])
        step = saved["step"]
    while step < (total if stop is None else stop):
        for x, y in train:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.report(loss)
            xv, yv = next(iter(val))
            opt.hyper_step(lambda xv=xv, yv=yv: F.cross_entropy(model(xv), yv))
            step += 1
        if step % (save * len(train)):
            continue
        state = {"net": model.state_dict(), "opt": opt.state_dict(), "step": step}
        torch.save({**state, "random": torch.get_rng_state()}, partial_path)
        os.replace(partial_path, path)
    opt.finish()
    with opt.averaged():
        return digest([model.state_dict(), opt.state_dict()["state"], opt.hparams])


JOBS: dict[str, Job] = {
    "Tuner": tuned,
    "SGD": partial(looped, "SGD"),
    "AdamW": partial(looped, "AdamW"),
}
SAVED = {"Tuner": "last.pt", "SGD": "saved.pt", "AdamW": "saved.pt"}


def curves(folder: Path) -> Curves:
    """All scalars of a log, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}


def holes(found: Curves, whole: Curves) -> list[str]:
    """Where curves differ from those of the whole run."""
    wrong = []
    for tag in sorted(found.keys() | whole.keys()):
        if tag.startswith(CLOCKS):
            continue
        a, b = found.get(tag, []), whole.get(tag, [])
        steps, others = [s for s, _ in a], [s for s, _ in b]
        if steps != others:
            missing, doubled = sorted(set(others) - set(steps)), len(steps) - len(set(steps))
            extra = sorted(set(steps) - set(others))
            wrong.append(f"{tag}: missing {missing}, not in the whole run {extra}, "
                         f"{doubled} doubled")  # fmt: skip
        elif repr(a) != repr(b):
            wrong.append(f"{tag}: other values")
    return wrong


@dataclass(frozen=True)
class Killed:
    """A run that was killed and resumed.

    Attributes:
        kind: ``Tuner``, or the optimizer of a loop.
        seed: Of the moments.
        save: Epochs from one checkpoint to the next.
        after: Seconds until each kill.
        saved: Whether a checkpoint was there at the last one.
        same: Whether it ended bit for bit as the whole run.
        wrong: Where its curves differ.
        error: A traceback, if it could not go on.
    """

    kind: str
    seed: int
    save: int
    after: tuple[float, ...]
    saved: bool
    same: bool
    wrong: list[str]
    error: str = ""


@dataclass(frozen=True)
class Whole:
    """A run that nobody kills."""

    digest: str
    curves: Curves
    seconds: float


def whole(kind: str, save: int, folder: Path) -> Whole:
    """Run it."""
    with scratch() as place:
        warm_up(partial(JOBS[kind], save, place))
    begun = time.monotonic()
    found = apart(partial(JOBS[kind], save, folder))
    seconds = time.monotonic() - begun
    return Whole(found, curves(folder), seconds)


def kill(kind: str, seed: int, save: int, truth: Whole, folder: Path) -> Killed:
    """Kill a run once or twice, and let it end."""
    draw = random.Random(f"{kind} {seed}")
    job = partial(JOBS[kind], save, folder)
    wanted, after = draw.choice((1, 1, 2)), []
    while len(after) < wanted:
        moment = draw.uniform(0, truth.seconds)
        if Child.of(job).killed(moment):
            after.append(moment)
        elif not after:  # it was faster than the whole run
            shutil.rmtree(folder)
            folder.mkdir()
        else:
            break
    saved = (folder / SAVED[kind]).exists()
    try:
        same = apart(job) == truth.digest
        wrong = holes(curves(folder), truth.curves)
    except Broken as error:
        return Killed(kind, seed, save, tuple(after), saved, False, ["no end"], str(error))
    return Killed(kind, seed, save, tuple(after), saved, same, wrong)


def kills(count: int) -> list[Killed]:
    """Half of them of the tuner, half of loops."""
    found = []
    for kind, share in (("Tuner", count - count // 2), ("SGD", count // 4),
                        ("AdamW", count // 2 - count // 4)):  # fmt: skip
        with scratch() as place:
            truths: dict[int, Whole] = {}
            for seed in range(share):
                save, folder = SAVES[seed % len(SAVES)], place / str(seed)
                if save not in truths:
                    truths[save] = whole(kind, save, place / f"whole {save}")
                folder.mkdir()
                found.append(kill(kind, seed, save, truths[save], folder))
                shutil.rmtree(folder)
    return found
