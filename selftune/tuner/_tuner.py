"""The tuner, which runs the training loop with compiled steps, logs and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from selftune import nn as st_nn
from selftune._arguments import check
from selftune._modes import modes_kept
from selftune.control import SweepSettings
from selftune.estimators import AbstractEstimator
from selftune.holdout import HoldOut
from selftune.hparams import Hparam, as_layer, choose
from selftune.method import SHARE, Average, MethodSettings
from selftune.penalties import L1, Penalties, as_list
from selftune.rules import AbstractRule, AdamW
from selftune.schedules import Schedule
from selftune.tuner import _checkpoints
from selftune.tuner._building import build, open_streams, tuned_names
from selftune.tuner._checks import ARGUMENTS, check_fit, check_hparams, check_model, device_of
from selftune.tuner._combinations import check_objective, check_together
from selftune.tuner._given import Given
from selftune.tuner._group import Group, join, quiet
from selftune.tuner._lock import owned
from selftune.tuner._logging import monitor_of
from selftune.tuner._objective import LossFn, Objective
from selftune.tuner._plan import Plan, Progress, between_entries, between_evaluations, length
from selftune.tuner._population import Population
from selftune.tuner._predicting import predict
from selftune.tuner._result import TuningResult
from selftune.tuner._scoring import Metric
from selftune.tuner._shards import from_first
from selftune.tuner._splitting import parts
from selftune.tuner._training import Training
from selftune.update import Update


class Tuner:
    """Trains a model and tunes its hyperparameters in one run, with compiled training steps.

    Args:
        model: Any module.
        loss_fn: ``loss_fn(output, target)``; batches are ``(*inputs, target)`` or dictionaries
            with a key ``target``, ``targets``, ``label``, ``labels`` or ``y``. None if the model
            returns its own loss.
        rule: The update rule; AdamW by default.
        hparams: Starting values and options by name, for example
            ``dict(lr=1e-3, momentum=0.9, l1=1e-6)``; others have the defaults (β₂: 1 − 20/T).
        tune: Tuned hyperparameters; by default those of the rule, all penalties and all layers.
        penalty: Further penalties (:mod:`selftune.penalties`).
        bounds: (lowest, highest) values by name.
        estimator: Estimates the sensitivities of the weights to the hyperparameters: one of
            :mod:`selftune.estimators`. By default ``Trace``, which tracks one step in four (more if
            the average is short), and :class:`BestResponse` for the layers of :mod:`selftune.nn`.
        tangents: Fraction of the weights whose sensitivities are kept, in (0, 1], rounded up to
            1/n; at least 4,096 weights and, by default, at most 2²⁰. Pass a dtype to keep all
            of them in that dtype.
        snapshots: Storage of the last good weights: ``"device"`` (exact), ``"host"`` (exact, in the
            CPU's memory) or ``"bf16"``, the default for 65,536 weights or more.
        average: Settings of the weight average at which the validation loss is measured.
        every: Weight steps between two hyperparameter steps; by default a thirtieth of the run,
            between 5 and 20.
        hyper_rate: Size of a hyperparameter step in log space; by default 0.01 times ``every``,
            between 0.05 and 0.2, and larger in runs of fewer than 1,000 steps.
        schedule: ``"linear"``, ``"cosine"``, ``"wsd"``, ``"exponential"`` or ``"constant"``.
        warmup_steps: Steps of the linear warm-up of the learning rate.
        probe: True for a learning-rate sweep at the start, False for none, its number of
            steps, or :class:`~selftune.control.SweepSettings`. After the sweep, the memory
            1/(1 − β₁) of a tuned β₁ is at most 1/300 of the run, or 3 steps if that is more.
        guard: True to rewind to the last good weights when the run diverges or its loss worsens,
            False for no guard, or a policy, such as :class:`~selftune.control.GuardPolicy`.
        objective: ``objective(model, batch)`` returns the loss, instead of ``loss_fn``.
        augment: Augmentation of training batches on the device (:class:`selftune.nn.Augment` or
            one of its parts): of the first input, in a dictionary of the floating-point one.
        metrics: Functions of (output, target) by name, averaged over the validation set.
        parallel: ``"ddp"`` to train on all ranks started by ``torchrun``, each on its part of every
            batch; ``"fsdp"`` to also shard the weights and their state (``fully_shard``). Then the
            model stays sharded, and ``result.best_weights`` are whole.
        device: Device of the run; by default that of the model. With ``parallel`` each rank uses
            its own GPU.
        amp: Run forward passes in bfloat16 autocast.
        compile: True, False, or ``"auto"`` to compile if the run is long enough for it to pay off.
        population: Number of members trained at once from different hyperparameters.
        exploit_every: Steps between two exchanges, in which the worst members copy the best.
        seed: Seed of the validation split and of the population's starting values.
        settings: Constants of the method (:class:`~selftune.method.MethodSettings`).

    Raises:
        ValueError: A name is unknown, or a value is invalid.

    Examples:
        >>> import torch, selftune as st
        >>> x = torch.randn(64, 4)
        >>> batches = [(part, part.sum(1, keepdim=True)) for part in x.split(16)]
        >>> tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss)
        >>> result = tuner.fit(batches[:3], batches[3:], epochs=2, progress=False)
        >>> result.steps
        6
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None = None,
        *,
        rule: AbstractRule | None = None,
        hparams: Mapping[str, Any] | None = None,
        tune: Sequence[str] | None = None,
        penalty: Penalties = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        estimator: AbstractEstimator | None = None,
        tangents: float | torch.dtype | None = SHARE,
        snapshots: str | None = None,
        average: Average | None = None,
        every: int | None = None,
        hyper_rate: float | None = None,
        schedule: str = "linear",
        warmup_steps: int = 0,
        probe: bool | int | SweepSettings = True,
        guard: Any = True,
        objective: Callable[[nn.Module, Any], Tensor] | None = None,
        augment: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
        parallel: str | None = None,
        device: str | torch.device | None = None,
        amp: bool = False,
        compile: bool | str = "auto",
        population: int = 1,
        exploit_every: int = 200,
        seed: int = 0,
        settings: MethodSettings | None = None,
    ) -> None:
        check(ARGUMENTS, locals())
        check_objective(objective, metrics, augment)
        check_model(model)
        if augment is not None and not isinstance(augment, st_nn.Augment):
            augment = st_nn.Augment(augment)
        self.model = model
        group, self._device = Group(), None if device is None else device_of(device)
        if parallel is not None:
            group, self._device = join(parallel, self._device or next(model.parameters()).device)
        rule = AdamW() if rule is None else rule.fresh()
        whole = Objective(model, loss_fn, objective, augment)
        strengths = st_nn.tunables(whole)
        st_nn.own_counters(whole)
        penalties = as_list(penalty)
        check_hparams(hparams or {}, rule, strengths, penalties)
        given = {n: v if isinstance(v, bool) else float(v) for n, v in (hparams or {}).items()}
        if "l1" in given and not any(p.name == "l1" for p in penalties):
            penalties.append(L1(given["l1"]))
        update = Update(rule, tuple(penalties))
        values = {n: 0.0 for n in update.hparams} | dict(rule.defaults)
        values |= {n: f.value for n, f in strengths.items()}
        values |= {p.name: p.strength for p in penalties} | given
        known = update.hparams | {n: as_layer(f.hparam) for n, f in strengths.items()}
        names = tuned_names(tune, update, strengths, schedule)
        members = Population(population, seed) if population != 1 else None
        if members is None:
            names = update.with_gradient(names, given=tune is not None)
        Schedule(shape=schedule, total_steps=None if schedule == "constant" else 10**9)
        choose(known, names, bounds, 1)
        self._given = Given(
            objective=whole, update=update, strengths=strengths, known=known,
            values=values, chosen=set(given), names=names, bounds=bounds, estimator=estimator,
            tangents=tangents, snapshots=snapshots, every=every, hyper_rate=hyper_rate,
            average=Average() if average is None else average, schedule=schedule, probe=probe,
            guard=guard, warmup=warmup_steps, metrics=dict(metrics or {}), amp=amp,
            population=members, settings=MethodSettings() if settings is None else settings,
            group=group,
        )  # fmt: skip
        check_together(self._given, compile)
        self._compile, self._exploit, self._seed = compile, exploit_every, seed
        self._fitted = False
        self._ended: Training | None = None

    @property
    def starts(self) -> dict[str, float]:
        """Starting values of the tuned hyperparameters, by name."""
        return {n: float(self._given.values[n]) for n in self._given.names}

    @property
    def scales(self) -> dict[str, Hparam]:
        """Scale and bounds of the tuned hyperparameters, by name."""
        return {n: self._given.known[n] for n in self._given.names}

    def start_from(self, values: Mapping[str, float]) -> list[str]:
        """Start tuned hyperparameters from the values of another run; the others do not change.

        The learning-rate sweep starts from the new rate. Values outside the bounds are clamped.

        Args:
            values: Values by name, as in ``TuningResult.hparams``.

        Returns:
            Names of the hyperparameters that were set.

        Raises:
            RuntimeError: ``fit`` was called before.
            ValueError: A value is not finite.
        """
        if self._fitted:
            raise RuntimeError("start_from was called after fit: call it before")
        taken = [n for n in self._given.names if n in values]
        for name in taken:
            if not math.isfinite(values[name]):
                raise ValueError(f"values[{name!r}]={values[name]} must be finite")
            known = self._given.known[name]
            self._given.values[name] = min(max(values[name], known.lower), known.upper)
        self._given.chosen.update(taken)
        return taken

    def fit(
        self,
        train: Iterable[Any],
        val: Iterable[Any] | float | HoldOut | None = 0.1,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        log_dir: str | Path | None = None,
        recorder: Any = None,
        callbacks: Sequence[Callable[[Progress], Any]] = (),
        resume: bool | str | Path = False,
        patience: int | None = None,
        evaluate_every: int | None = None,
        checkpoint_every: int | None = None,
        log_every: int | None = None,
        pictures_every: int | None = None,
        progress: bool = True,
    ) -> TuningResult:
        """Train, and leave the weights with the lowest validation loss in the model.

        With ``val=None``, leave the averaged weights, or the last good ones if the run overfits.

        Args:
            train: A DataLoader, or any iterable of batches.
            val: Validation batches, the fraction of the training data to use for validation, or
                None to hold out a tenth until 60 % of the run (or a :class:`selftune.HoldOut`).
            epochs: Length of the run in passes over ``train``. Pass either this or ``steps``.
            steps: Length of the run in weight steps.
            log_dir: Folder for TensorBoard and checkpoints (``last.pt``, ``best.pt``).
            recorder: Additional receiver of log entries: a recorder of :mod:`selftune.monitor`, a
                ``function(values, step)``, or a list of these.
            callbacks: Called with :class:`Progress` after each evaluation, while the model has
                the averaged weights; returning True ends the run.
            resume: True to continue from ``log_dir/last.pt`` if it exists, or the path of a
                checkpoint. With more ``epochs`` or ``steps`` a finished run is extended.
            patience: Number of evaluations without improvement after which the run ends.
            evaluate_every: Steps between evaluations on ``val``; by default one or more epochs, or
                a tenth of the run if ``train`` has no length.
            checkpoint_every: Steps between checkpoints; by default at each evaluation.
            log_every: Steps between two log entries. By default 50, at least 0.1 s apart; in runs
                of fewer than 1,000 steps, a twentieth of the run.
            pictures_every: Steps between two plots of the predicted loss around each learned
                hyperparameter; by default none. Curves need up to 50 validation batches, maps 250.
            progress: Whether to show a progress bar.

        Raises:
            RuntimeError: ``fit`` was called before.
            FileNotFoundError: The checkpoint to resume does not exist.
            ValueError: Invalid data, length or checkpoint, or a log_dir in use; nothing changes.
        """
        if self._fitted:
            raise RuntimeError(
                "fit was already called on this Tuner: make a new Tuner; to continue a run, pass "
                "resume=True and the same log_dir to its fit"
            )
        given, objective, group = self._given, self._given.objective, self._given.group
        check_fit(group, locals())
        folder = None if log_dir is None else Path(log_dir).absolute()
        with quiet(not group.first), ExitStack() as stack, modes_kept(objective):
            group.from_first(lambda: stack.enter_context(owned(folder)))
            saved = from_first(group, lambda: _checkpoints.find(resume, folder))
            group.share_streams()
            data, (train, val, holding, share) = train, parts(train, val, self._seed)
            whole = train if holding is None else data
            device = self._device or next(self.model.parameters()).device
            objective.train()
            streams = stack.enter_context(open_streams(train, val, whole, device, given))
            total = length(streams[0], streams[2], epochs, steps)
            score = evaluate_every or between_evaluations(streams[0], total)
            spacing, rest = between_entries(total, log_every)
            plan = Plan(
                total=total, every=given.settings.hyper.every(total, given.every), score=score,
                seed=self._seed, save=checkpoint_every or score, log=spacing, rest=rest,
                patience=patience, picture=pictures_every, compile=self._compile, share=share,
                exploit=self._exploit, join=None if holding is None else holding.join(total),
            )  # fmt: skip
            training = build(given, plan, streams, val, device, saved and saved[0])
            stack.callback(training.scorer.close)
            training.callbacks, hidden = callbacks, not (progress and group.first)
            training.watch.bar = tqdm(total=total, disable=hidden, unit="step")
            if saved is not None:
                training.load(*saved)
            monitor = monitor_of([t for t in (log_dir, recorder) if t is not None], group.first)
            training.folder, training.watch.metrics.monitor = folder, monitor
            if resume:  # -1: a run that was killed before its first checkpoint
                monitor.resume(-1 if saved is None else training.step)
            starts = {**training.watch.hparams(), **training.steps.starts}
            begin = monitor.begin if saved is None else monitor.begin_anew
            begin(starts, training.steps.hyper.names)
            self._fitted, self._ended = True, training
            try:
                result = training.finish(training.go())
            except BaseException:
                monitor.end("failed")
                raise
            monitor.end(result.ended)
            return result

    def predict(self, **values: Sequence[float]) -> NDArray[Any]:
        """Predict the validation loss at other hyperparameters with the learned hypernetwork.

        ``L_val(w̄ + J (z' − z))`` over the validation set; J is the learned sensitivity of the
        weights.

        Args:
            values: Values of one or two hyperparameters by name. Their sensitivity must have been
                learned (:class:`BestResponse`): those of layers and losses and,
                with ``update=True``, those of the update.

        Returns:
            Losses, shape (values,) or (values of the first, values of the second).

        Raises:
            RuntimeError: ``fit`` has not been called.
            ValueError: The sensitivity of a hyperparameter was not learned, or a value is outside
                its bounds.

        Examples:
            >>> import torch, selftune as st
            >>> batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(4, 16, 4)]
            >>> net = torch.nn.Sequential(st.nn.Dropout(0.1), torch.nn.Linear(4, 1))
            >>> tuner = st.Tuner(net, torch.nn.functional.mse_loss)
            >>> result = tuner.fit(batches[:3], batches[3:], epochs=2, progress=False)
            >>> tuner.predict(dropout=[0.05, 0.1, 0.2]).shape
            (3,)
        """
        if self._ended is None:
            raise RuntimeError("predict needs the sensitivities learned by a run: call fit first")
        return predict(self._ended, values)
