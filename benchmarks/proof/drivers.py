"""One self-tuned run by either driver: the drop-in optimizers and the tuner.

Both train the same model on the same batches, for as many steps, from the same hyperparameters,
tuned on validation batches in the same order: ``st.AdamW`` or ``st.SGD`` in a loop of one's own,
and ``st.Tuner``, not compiled. What a run changes of the defaults is a dictionary of options,
the same for both.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import selftune as st
from benchmarks.proof.training import Contender, judge, train
from benchmarks.workloads import Batch, Workload, named
from selftune.method import HyperSettings
from selftune.optim import SelfTuningOptimizer
from selftune.optim._rule_optimizer import RuleOptimizer
from selftune.rules import AbstractRule
from selftune.rules.adam import fitting_beta2

SPLITS = "val", "test"
STARTS: dict[str, dict[str, float]] = {
    "AdamW": {"lr": 1e-3, "beta1": 0.9, "weight_decay": 1e-2},
    "SGD": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
}
"""Where hyperparameters start, by rule; for both drivers."""


def started(workload: Workload, rule: str, start: Mapping[str, float] | None) -> dict[str, float]:
    """Hyperparameters at the start; β₂ fits the length of the run unless it is given."""
    fitting = {"beta2": fitting_beta2(workload.steps)} if rule == "AdamW" else {}
    return {**STARTS[rule], **fitting, **(start or {})}


def defined(rule: str, momenta: Mapping[str, Any] | None) -> AbstractRule:
    """A rule of the library, perhaps with momenta defined otherwise.

    Args:
        rule: Its name.
        momenta: What changes in their definitions (:class:`selftune.hparams.Hparam`).
    """
    made: AbstractRule = getattr(st.rules, rule)()
    if momenta:
        made.hparams = tuple(
            replace(h, **momenta) if h.role == "momentum" else h for h in made.hparams
        )
    return made


def make_optimizer(
    workload: Workload,
    model: nn.Module,
    rule: str,
    *,
    start: Mapping[str, float] | None = None,
    momenta: Mapping[str, Any] | None = None,
    hyper_rate: float | None = None,
    **options: Any,
) -> SelfTuningOptimizer:
    """``st.AdamW`` or ``st.SGD`` over a workload's model.

    Args:
        workload: What is trained.
        model: Its model.
        rule: ``AdamW`` or ``SGD``.
        start: Hyperparameters that start elsewhere than in ``STARTS``.
        momenta: What changes in the definitions of momenta.
        hyper_rate: Size of a hyperparameter step, as of the tuner.
        options: Of the optimizer.
    """
    values: dict[str, Any] = started(workload, rule, start)
    options = {"total_steps": workload.steps, **options}
    if hyper_rate is not None:
        adam = partial(torch.optim.Adam, lr=hyper_rate, betas=HyperSettings().betas)
        options["hyper_optimizer"] = adam
    made = defined(rule, momenta)
    if momenta:  # torch's options in full, which a shell of the library would fill in
        values = {**made.defaults, "decay": 0.0, "l1": 0.0, "maximize": False, **values}
    if rule == "AdamW":
        values["betas"] = values.pop("beta1"), values.pop("beta2")
    if momenta:
        return RuleOptimizer(model, made, None, options, **values)
    optimizer: SelfTuningOptimizer = getattr(st, rule)(model, **values, **options)
    return optimizer


def make_tuner(
    workload: Workload,
    model: nn.Module,
    rule: str,
    *,
    start: Mapping[str, float] | None = None,
    momenta: Mapping[str, Any] | None = None,
    **options: Any,
) -> st.Tuner:
    """``st.Tuner`` over a workload's model; arguments as of :func:`make_optimizer`."""
    return st.Tuner(
        model, workload.criterion, rule=defined(rule, momenta),
        hparams=started(workload, rule, start), compile=False, **options,
    )  # fmt: skip


class SelfTuned(Contender):
    """This library's optimizer in a loop: one fixed configuration for every workload.

    Args:
        workload: What is trained.
        model: Its model.
        seed: Of validation batches.
        rule: ``AdamW`` or ``SGD``.
        joined: Validation batches joined into one.
        options: Of :func:`make_optimizer`.
    """

    averages = True

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        seed: int,
        rule: str = "AdamW",
        joined: int = 1,
        **options: Any,
    ) -> None:
        self.workload, self.model, self.joined = workload, model, joined
        self.optimizer = make_optimizer(workload, model, rule, **options)
        self.validation = workload.batches("val", seed + 777, joined)

    def step(self, batch: Batch) -> None:
        """A weight step, then perhaps one of the hyperparameters."""
        self.optimizer.zero_grad()
        self.workload.loss(self.model, batch).backward()
        self.optimizer.step()
        self.gradients += 1
        self.optimizer.hyper_step(self._outer)

    def _outer(self) -> Tensor:
        self.gradients += self.joined
        return self.workload.loss(self.model, next(self.validation))

    def showing(self) -> Any:
        """The averaged weights."""
        return self.optimizer.averaged()

    def ends(self) -> dict[str, float]:
        """Tuned values."""
        return dict(self.optimizer.hparams)


class Shuffled:
    """A loader whose epochs are those of ``workload.batches(split, seed, times)``.

    The tuner trains on one iterator after the other, and now and then begins another one meanwhile
    to score the whole split. Such a one leaves the order of the epochs alone: it gives the split as
    it lies, the examples included that do not fill a batch.

    Args:
        workload: Whose data.
        split: Which part of it.
        seed: Of the order.
        times: Batches joined into one.
    """

    def __init__(self, workload: Workload, split: str, seed: int, times: int = 1) -> None:
        self.inputs, self.targets = workload.splits[split]
        self.size = min(times * workload.batch_size, len(self.inputs))
        self.generator = torch.Generator().manual_seed(seed)
        self._read = False  # whether an epoch is under way

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def __iter__(self) -> Iterator[Batch]:
        if self._read:
            yield from zip(self.inputs.split(self.size), self.targets.split(self.size), strict=True)
            return
        self._read = True
        try:
            order = torch.randperm(len(self.inputs), generator=self.generator)
            for index in order[: len(self) * self.size].split(self.size):
                yield self.inputs[index], self.targets[index]
        finally:  # also where the reader lets go of it
            self._read = False


@dataclass(frozen=True)
class Run:
    """Losses at the weights that a run ends with.

    Attributes:
        workload: What was trained.
        face: ``optimizer`` or ``tuner``.
        rule: ``AdamW`` or ``SGD``.
        seed: Of weights and batches.
        val: Loss over the whole validation set; infinite if it is not finite.
        test: Loss over the whole test set.
        seconds: Of training.
        ends: Hyperparameters at the end; the learning rate is the tuned peak.
    """

    workload: str
    face: str
    rule: str
    seed: int
    val: float
    test: float
    seconds: float
    ends: dict[str, float] = field(default_factory=dict)


def by_optimizer(workload: Workload, rule: str, seed: int, **options: Any) -> Run:
    """One run of an optimizer, as in the proof."""
    make = partial(SelfTuned, rule=rule, **options)
    record = train(workload, "selftune", make, seed, checkpoints=0)
    val, test = (record.own[split] for split in SPLITS)
    return Run(workload.name, "optimizer", rule, seed, val, test, record.seconds, record.ends)


def by_tuner(workload: Workload, rule: str, seed: int, joined: int = 1, **options: Any) -> Run:
    """One run of a tuner."""
    model = workload.model(seed)
    tuner = make_tuner(workload, model, rule, **options)
    begun = time.perf_counter()
    result = tuner.fit(
        Shuffled(workload, "train", seed), Shuffled(workload, "val", seed + 777, joined),
        steps=workload.steps, evaluate_every=workload.steps, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    found = judge(workload, model)
    return Run(
        workload.name, "tuner", rule, seed, found["val"], found["test"], seconds, result.hparams
    )


FACES: dict[str, Callable[..., Run]] = {"optimizer": by_optimizer, "tuner": by_tuner}


def work(name: str, face: str, rule: str, seed: int, **options: Any) -> Run:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return FACES[face](named(name), rule, seed, **options)
