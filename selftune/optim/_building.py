"""The engine of a self-tuned optimizer, built from its options."""

from __future__ import annotations

from selftune._identity import describe
from selftune.control import Controller, make_guard, make_sweep
from selftune.estimators import assign
from selftune.method import Method, Sensitivities, WeightDecayFloor
from selftune.method.slices import wanted
from selftune.monitor import Monitor
from selftune.optim._buffers import Buffers
from selftune.optim._closures import ClosureSteps
from selftune.optim._engine import Engine
from selftune.optim._options import TuningOptions
from selftune.optim._reducer import Reducer
from selftune.optim._shifts import Shifts
from selftune.optim._stepper import Opaque, Stepper
from selftune.optim._store import Store
from selftune.update import Update


def build(options: TuningOptions, update: Update, stepper: Stepper) -> Engine:
    settings, total, label = options.settings, options.total_steps, options.name or stepper.name
    every, tune = settings.hyper.every(total, options.every), options.tune
    if tune is None:  # ``decay`` only if no schedule anneals
        tune = [n for n in update.tuned if total is None or n != "decay"]
    if not isinstance(tune, str):  # a string is refused by the shifts
        tune = update.with_gradient(tune, given=options.tune is not None)
    shifts = Shifts(
        update.hparams, tune=tune, size=settings.hyper.size(every, total), per=options.per,
        bounds=options.bounds, total_steps=total,
        floor=WeightDecayFloor.of(update.rule, options.learning_rate, settings.floor),
        settings=settings.hyper, make=options.hyper_optimizer, label=label,
    )  # fmt: skip
    assigned = assign(
        options.estimator, update, shifts.names, stride=min(options.average.stride, every),
        answers_all=True,
    )  # fmt: skip
    whole = assigned.whole
    if whole is not None and isinstance(update.rule, Opaque):
        raise ValueError(
            f"estimator={whole} needs a rule of the library (SGD, Adam, …): another "
            "optimizer's steps cannot be differentiated; use Trace or OneStep"
        )
    rows = shifts.names if whole is None else []
    share, storage = wanted(options.tangents, update, whole)
    reducer, guard = Reducer(options.distributed), make_guard(options.guard)
    return Engine(
        store=Store(
            method=Method(
                sensitivities=Sensitivities(
                    rows, update, assigned.rows, options.average, storage
                ),
                hyper=shifts.hyper, settings=settings, horizon=shifts.horizon,
                guarded=guard is not None, total=reducer.total, outer_total=reducer.outer,
            ),
            shifts=shifts,
            reducer=reducer,
        ),
        controller=Controller(
            hparams=shifts.tuned, total_steps=total, guard=guard,
            sweep=make_sweep(options.probe, total, shifts.tuned, options.warmup_steps), label=label,
        ),
        every=every,
        buffers=Buffers(options.model, every),
        monitor=Monitor(options.log_dir if reducer.first else None, options.name),
        stepper=stepper,
        share=share,
        snapshots=options.snapshots,
        whole=None if whole is None else ClosureSteps(whole, update, shifts),
        identity=options.identity(describe(assigned)),
    )  # fmt: skip
