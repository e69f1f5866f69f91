"""One self-tuned run against searches over the same regularizers.

    python -m benchmarks.quality.regularizers --job digits|images|text [--trials 30]
        [--robust NAME] [--only self-tuned --every 1]

``digits``: a CNN on 1,000 of scikit-learn's digits with four dropout rates and translation.
``images``: a CNN on 10,000 Fashion-MNIST images with three dropout rates, label smoothing and four
augmentations. ``text``: an LSTM on tiny-Shakespeare characters with seven regularizers. Searches
choose these, the learning rate and weight decay, for plain AdamW runs of the same length; every
run is judged at its averaged weights. Three splits: the validation loss tunes and chooses, the
test loss is reported. ``--robust`` starts a rate at 0 and at 0.9 instead: where does it end, and
with which loss? ``--every`` perturbs every so many steps (``BestResponse``). Needs optuna (extra
``bench``) and ``SELFTUNE_DATA``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

import selftune as st
from benchmarks.quality.regularizer_jobs import JOBS, Batch, Job, Space

UPDATE: Space = dict(lr=(1e-4, 3e-2), weight_decay=(1e-4, 1.0))


class PlainRun:
    """A plain AdamW run at fixed values, with linear decay; its copies go on from where it is.

    Args:
        job: What is trained.
        values: The regularizers, ``lr`` and ``weight_decay``.
        seed: Of the weights.
    """

    def __init__(self, job: Job, values: Mapping[str, float], seed: int) -> None:
        torch.manual_seed(seed)
        self.job, self.rate, self.taken = job, values["lr"], 0
        self.model, self.loss_fn, self.augment = job.make(), job.loss(), job.augment()
        self.set(values)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=self.rate, weight_decay=values["weight_decay"]
        )
        self.begin_average()

    def set(self, values: Mapping[str, float]) -> None:
        """Set all regularizers of the model, its loss and augmentation."""
        for part in (self.model, self.loss_fn, self.augment):
            for module in part.modules() if part is not None else ():
                if isinstance(module, st.nn.Tunable):
                    module.strength.fill_(values[module.hparam.name])

    def begin_average(self) -> None:
        """Average the weights from here on."""
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98),
            use_buffers=True,
        )  # fmt: skip

    def train(self, batches: Iterable[Batch]) -> None:
        """A step for each batch."""
        self.model.train()
        for x, y in batches:
            rate = self.rate * (1 - self.taken / self.job.steps)
            self.optimizer.param_groups[0]["lr"] = rate
            x, y = (x, y) if self.augment is None else self.augment(x, y)
            self.optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y) + st.nn.extra_loss(self.model)
            loss.backward()
            nn.utils.clip_grad_norm_(self.params, 10.0)
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.taken += 1

    def score(self, split: str) -> float:
        """Of the averaged weights."""
        return self.job.score(self.average.module, split)


def trial(job: Job, values: Mapping[str, float], seed: int) -> tuple[float, float, float]:
    """A plain AdamW run at fixed values: validation and test loss, seconds."""
    run = PlainRun(job, values, seed)
    start = time.perf_counter()
    run.train(itertools.islice(job.batches("train", seed), job.steps))
    taken = time.perf_counter() - start
    val, test = (x if math.isfinite(x) else math.inf for x in map(run.score, ("val", "test")))
    return val, test, taken


def self_tuned(
    job: Job, seed: int, starts: Mapping[str, float] | None = None, **options: Any
) -> tuple[float, float, float, dict[str, float]]:
    """One run of the tuner with its defaults: losses, seconds, and where its values ended."""
    torch.manual_seed(seed)
    model = job.make()
    given = {"lr": 1e-3, **(starts or {})}
    tuner = st.Tuner(model, job.loss(), augment=job.augment(), hparams=given, seed=seed, **options)
    seen: list[float] = []

    def timed() -> Iterator[Batch]:
        seen.append(time.perf_counter())
        yield from job.batches("train", seed)

    result = tuner.fit(
        timed(), Endless(job, seed), steps=job.steps, evaluate_every=job.steps // 10,
        progress=False,
    )  # fmt: skip
    taken = time.perf_counter() - seen[0]
    return job.score(model, "val"), job.score(model, "test"), taken, result.hparams


class Endless:
    """The validation set in whole batches, shuffled anew each time."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job, self.seed = job, seed

    def __len__(self) -> int:
        return len(self.job.splits["val"][0]) // self.job.batch

    def __iter__(self) -> Iterator[Batch]:
        self.seed += 1000
        stream = self.job.batches("val", self.seed)
        for _ in range(len(self)):
            yield next(stream)


def search(
    job: Job, sampler: str, trials: int, seed: int, journal: str | None
) -> tuple[float, float, float]:
    """The trial with the lowest validation loss: that, its test loss, and seconds of all."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind = {"random": optuna.samplers.RandomSampler, "TPE": optuna.samplers.TPESampler}[sampler]
    storage = journal and JournalStorage(JournalFileBackend(journal))
    name = f"{sampler} {seed}"
    study = optuna.create_study(
        sampler=kind(seed=seed), storage=storage, study_name=name, load_if_exists=True
    )

    def objective(asked: optuna.Trial) -> float:
        space = {**UPDATE, **job.space}
        values = {n: asked.suggest_float(n, *ends, log=True) for n, ends in space.items()}
        val, test, taken = trial(job, values, seed)
        asked.set_user_attr("test", test)
        asked.set_user_attr("taken", taken)
        return val if math.isfinite(val) else 1e9

    study.optimize(objective, n_trials=max(0, trials - len(study.trials)))
    best = study.best_trial
    total = sum(t.user_attrs.get("taken", 0.0) for t in study.trials)
    return study.best_value, best.user_attrs["test"], total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=tuple(JOBS), required=True)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--robust", help="a rate to start at 0 and at 0.9 instead")
    parser.add_argument("--journal", help="file that keeps the searches' trials, to go on later")
    parser.add_argument("--every", type=int, help="steps between two perturbed steps")
    parser.add_argument("--only", choices=("searches", "self-tuned"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    job = JOBS[args.job]()
    print("| method | seed | validation | test | seconds |\n|---|---|---|---|---|")

    def row(label: str, seed: int, found: tuple[float, float, float]) -> None:
        val, test, taken = found
        print(f"| {label} | {seed} | {val:.4f} | {test:.4f} | {taken:.0f} |", flush=True)

    for seed in range(args.seeds):
        starts = [{args.robust: rate} for rate in (0.0, 0.9)] if args.robust else [{}]
        for start in () if args.only == "searches" else starts:
            estimator = st.BestResponse(every=args.every) if args.every else None
            *found, ends = self_tuned(job, seed, start, estimator=estimator)
            told = "".join(f", {name} from {rate:g}" for name, rate in start.items())
            row("one self-tuned run" + told, seed, (found[0], found[1], found[2]))
            print(f"<!-- { ({n: round(v, 4) for n, v in ends.items()}) } -->", flush=True)
        for sampler in () if args.robust or args.only == "self-tuned" else ("random", "TPE"):
            best = search(job, sampler, args.trials, seed, args.journal)
            row(f"best of {args.trials}, {sampler}", seed, best)


if __name__ == "__main__":
    main()
