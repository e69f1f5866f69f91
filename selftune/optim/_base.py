"""Base class of self-tuned optimizers: torch's interface around an engine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from selftune._modes import autocast_kept, without_autocast
from selftune.monitor import Course
from selftune.optim._advice import Advice
from selftune.optim._assembly import Assembly
from selftune.optim._building import build
from selftune.optim._closures import Call
from selftune.optim._evaluation import EvaluationMode
from selftune.optim._groups import Groups
from selftune.optim._logging import OptimizerLog
from selftune.optim._memory import Memory, memory_of
from selftune.optim._options import Tuning, options_of
from selftune.optim._outer import Closure, OuterLoss
from selftune.optim._stepper import Stepper
from selftune.optim._weight_steps import WeightSteps
from selftune.penalties import described
from selftune.update import Update

Params = nn.Module | Iterable[Any]


class SelfTuningOptimizer(EvaluationMode):
    """A torch optimizer that tunes its hyperparameters by gradient.

    Args:
        params: A module, parameters, named parameters or parameter groups, as for torch.
        defaults: The optimizer's options as in torch, and ``decay``.
        update: The update rule, with its hyperparameters and penalties.
        stepper: Computes the weight steps.
        **tuning: Options of :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        update: Update,
        stepper: Stepper,
        **tuning: Unpack[Tuning],
    ) -> None:
        if isinstance(params, nn.Module):
            tuning, params = {"model": params, **tuning}, params.named_parameters()
        options = options_of(type(self), tuning)
        self._schedule, self._update = options.learning_rate, update
        names, penalties = ", ".join(update.hparams), described(update.penalties)
        self._kind = f"{stepper.name} over {names}; penalties: {penalties}"
        self._engine = build(options, update, stepper)
        shifts = self._engine.shifts
        self._groups = Groups(update, shifts)
        self._assembly = Assembly(self._engine, self._groups)
        self._log = OptimizerLog(self._engine.monitor, shifts)
        self._advice = Advice(self._schedule)
        self._advice.name_strengths(self._engine.controller.label, options.model)
        super().__init__(params, defaults)
        if not any(p.requires_grad for g in self.param_groups for p in g["params"]):
            raise ValueError(
                "params: none of the parameters requires a gradient: unfreeze some with "
                "requires_grad_(); the others may stay frozen"
            )

    @torch._disable_dynamo  # as torch's optimizers: kernels and controller run eagerly
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a weight step, as torch's optimizers do, and return the closure's loss.

        Raises:
            RuntimeError: Inside ``averaged()``, or parameters differ between processes.
            ValueError: A gradient is sparse; nothing is changed.
        """
        self._outside("step()")
        loss = None
        if closure is not None:
            closure = autocast_kept(closure, self._device)
        call = self._call(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast(self._device):
            return self._step(call, loss)

    def _step(self, call: Call | None, loss: Tensor | None) -> Tensor | None:
        if self._idle():
            # Distributed checkpointing only needs the state; nothing is tuned yet.
            self._assembly.make(self.param_groups, self.state)
            self._engine.stepper.make_state()
            return loss
        engine, blocks = self._engine, self._blocks()
        if all(p.grad is None for b in blocks for p in b.params):
            return loss
        if not engine.reducer.checked:
            engine.reducer.check_alike(engine.params)
        self._take_up()
        values = self._groups.values(self.param_groups)
        rates = self._groups.rates(self.param_groups, self._schedule(engine.clock.steps))
        step = WeightSteps(engine, values, rates, call, raised=self._groups.raised)
        if step.take():
            self._publish()
        self._groups.show_rates(self.param_groups, step.factors, engine.clock.steps - 1)
        groups = self._groups
        self._advice.give(engine, annealed=groups.annealed, writes=groups.writes)
        if loss is not None:
            self.report(loss)
        self._stepped()
        return loss

    @torch._disable_dynamo
    def hyper_step(
        self, closure: Closure, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor | None:
        """Take a hyperparameter step with the gradient of a validation loss at averaged weights.

        You may call it after every training step. It returns at once if fewer than ``every``
        training steps have passed since the last hyperparameter step, and during the learning-rate
        sweep. It does not change ``.grad``.

        Args:
            closure: Returns the validation loss, a scalar with its graph, without calling
                ``backward``. The loss is minimised, even with ``maximize=True``. The closure runs
                more than once at the first call, for the log, after an alarm and at the run's end.
            scaler: The scaler of the training loss, if there is one. The validation loss is then
                differentiated at the same scale, so that float16 gradients do not underflow.

        Returns:
            The loss, detached; None if no hyperparameter step is due or no training step has been
            taken yet (gradient accumulation, or a ``GradScaler`` that skipped the first step).

        Raises:
            RuntimeError: Called inside ``averaged()``, or another process does not call it.
            TypeError: The closure does not return a tensor, or ``scaler`` has no ``get_scale``.
            ValueError: The loss is not a scalar, has no graph, does not depend on the parameters,
                or is not finite, even at the last good weights; nothing is changed.
        """
        self._outside("hyper_step()")
        if not callable(closure):
            raise TypeError(
                f"hyper_step takes a function, got {type(closure).__name__}: "
                "opt.hyper_step(lambda: loss_fn(model(x), y))"
            )
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise TypeError(
                f"scaler={type(scaler).__name__} must be a torch.amp.GradScaler, or None"
            )
        engine = self._engine
        if engine.clock.steps == 0:
            return None
        due, ends = engine.due(self._schedule.total_steps)
        if engine.known and not due and not ends:
            engine.clock.called()
            return None
        outer = OuterLoss(engine, 1.0 if scaler is None else scaler.get_scale())
        device = self._device
        with without_autocast(device):
            return self._hyper_step(outer, autocast_kept(closure, device), due=due, ends=ends)

    def _hyper_step(
        self, outer: OuterLoss, closure: Closure, *, due: bool, ends: bool
    ) -> Tensor | None:
        engine, clock = self._engine, self._engine.clock
        engine.reducer.meet(clock.steps)
        with torch.no_grad():
            self._blocks()
            self._take_up()
            engine.apply_masks()
        if (engine.notice_growth() and ends) or not engine.known:
            # Also an early check of the return value, without advancing random generators.
            with outer.random(), engine.buffers.discovering(engine.params):
                first = outer.first(closure)
            engine.buffers.passed()
            if not engine.first_loss_seen:
                self._begin(first)
        clock.called()
        loss = self._tune(outer, closure) if due else None
        if ends:
            with torch.no_grad():
                outer.judge_end(closure)
        elif clock.steps > (self._schedule.total_steps or 0):
            engine.controller.final.forget()
        return loss

    @property
    def _device(self) -> str:
        return str(next(p.device.type for g in self.param_groups for p in g["params"]))

    def _begin(self, first: Tensor) -> None:
        engine = self._engine
        loss = float(engine.reducer.mean(first))
        if engine.controller.guard is not None:
            engine.controller.guard.begin(loss)
        engine.first_loss_seen = True
        self._log.begin(self.hparams)
        if math.isfinite(loss) and engine.shifts.wake():
            self._publish()

    def _tune(self, outer: OuterLoss, closure: Closure) -> Tensor:
        engine, clock = self._engine, self._engine.clock
        begun = time.monotonic()
        loss, grads = outer.gradients(closure)
        engine.buffers.passed()
        loss = engine.reducer.mean(loss)
        if not math.isfinite(value := float(loss)):
            outer.check_finite(closure)
        with torch.no_grad():
            if engine.shifts.wake():
                self._publish()
            values = self._groups.values(self.param_groups)
            if engine.outer_step(value, grads, values, lambda: outer.compared(closure)):
                self._publish()
            self._log.note(clock.steps)
            if engine.monitor.on:
                shown = self._groups.present(self.param_groups, constant=True)
                self._log.hyper_step(loss, shown, self.param_groups, clock.steps, begun)
            if self._log.due and not engine.reducer.together:
                self._log.metrics.compared(loss, outer.value(closure), clock.steps)
        return loss

    def sync(self, weights: bool = True) -> None:
        """Copy the current weights to the averaged and the last good weights.

        Call it after loading, pruning or re-initialising weights during a run. Otherwise the
        average contains the previous weights for about 1/(1 − ρ) steps, and a rewind returns to
        them. Hyperparameters and sensitivities do not change. Weights that a mask holds at exactly
        0, and frozen parameters, need no call, because the averages follow them.

        Args:
            weights: False if masks have closed units: only live units are counted anew.

        Raises:
            RuntimeError: Called inside ``averaged()``.

        Examples:
            >>> import torch, selftune as st
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = st.SGD(net, lr=0.1)
            >>> net.load_state_dict(torch.nn.Linear(2, 1).state_dict())
            <All keys matched successfully>
            >>> opt.sync()
        """
        self._outside("sync()")
        with torch.no_grad():
            self._blocks()
            self._engine.sync() if weights else self._engine.controller.units_closed()

    def report(self, loss: Tensor | float) -> None:
        """Pass the training loss to the log and the guard; optional.

        ``step(closure)`` does so automatically; otherwise call it after ``step()``. The run rewinds
        to the last good weights if the loss explodes, or is not finite three times in a row, and
        gradients at other weights are then set to 0; losses on a GPU, or of several processes, are
        only logged.
        """
        engine = self._engine
        told = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), device="cpu")
        value = told.detach().clone()
        engine.monitor.scalar("Loss/train", value, engine.clock.steps)
        self._log.metrics.trained = value
        alone = not value.is_cuda and not engine.reducer.together  # no sync, equal on all ranks
        if not engine.blocks or not alone:
            return
        with torch.no_grad():
            self._take_up()
            if engine.report(float(value)):
                self._publish()
                for param in (p for block in engine.blocks for p in block.params):
                    if param.grad is not None:  # not None, which a GradScaler would refuse
                        param.grad.zero_()

    def memory(self) -> Memory:
        """Memory used besides the weights: a table of names, sizes and reasons.

        Examples:
            >>> import torch, selftune as st
            >>> print(st.AdamW(torch.nn.Linear(500, 100)).memory())
            kept                 MB  ÷ weights  why
            rule state         0.40       2.00  as in torch's optimizer
            average            0.20       1.00  where the validation loss is measured
            sensitivities      0.09       0.45  of 1/11 of the weights, to hyperparameters
            displacement       0.04       0.18  limits the rate
            last good weights  0.20       1.00  restored when a run diverges or worsens
            candidate          0.20       1.00  good if later losses confirm it; small models only
            total              1.13       5.64  besides the weights
        """
        with torch.no_grad():
            blocks = self._blocks()
        return memory_of(blocks, dict(self._engine.stepper.state))

    def explain(self) -> str:
        """Explain the value of each tuned hyperparameter in one line, from the recorded run.

        Examples:
            >>> import torch, selftune as st
            >>> print(st.SGD(torch.nn.Linear(2, 1), lr=0.1, tune=("lr",), total_steps=90).explain())
            lr: given 0.1 → unchanged → annealed by a linear schedule
        """
        values, engine = self.hparams, self._engine
        with torch.no_grad():
            self._blocks()
        controller, shifts = engine.controller, engine.shifts
        course = Course(
            given={n: t.given for n, t in shifts.rows.items()}, swept=controller.swept,
            rewinds=controller.rewinds, annealed=str(self._schedule.shape), hparams=shifts.tuned,
        )  # fmt: skip
        return course.explain(shifts.middles(), self._log.verdicts(values, engine.clock.steps))

    def flush(self) -> None:
        """Write buffered log entries now; otherwise they are written in blocks."""
        self._engine.monitor.flush()

    def finish(self) -> None:
        """Log the final hyperparameters and the end of the run; optional."""
        why, steps = self.explain(), self._engine.clock.steps
        self._log.finish(self._groups.present(self.param_groups, constant=True), steps, why)

    # internals

    def _call(self, closure: Closure | None) -> Call | None:
        """The closure, for an estimator that needs gradients at other weights."""
        engine = self._engine
        if engine.whole is None:
            return None
        if closure is None:
            raise RuntimeError(
                "this estimator needs gradients at other weights: call step(closure) with a "
                "closure that clears gradients, computes the loss and calls backward"
            )
        blocks = self._blocks()
        if len(blocks) > 1 or any(g.get("maximize") for g in self.param_groups):
            raise ValueError(
                f"params: {len(blocks)} parameter groups: whole-step estimators support only one, "
                "without maximize=True; put all parameters in one group, or use Trace or OneStep"
            )
        return Call(closure, blocks[0], engine.buffers.tensors)

    def _idle(self) -> bool:
        """Whether this is the empty step by which distributed checkpointing creates state."""
        if not self._assembly.empty or any(float(g["lr"]) != 0 for g in self.param_groups):
            return False
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        return not any(bool(g.any()) for g in grads if g is not None)
