"""The optimizer shell: torch's interface outside, the engine inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selftune.averaging import Average
from selftune.estimators import AbstractEstimator, Trace
from selftune.guard import Guard
from selftune.hyperstep import HyperOptimizer, adam
from selftune.monitor import Monitor, hyper_rows
from selftune.optim._block import Block
from selftune.optim._buffers import Buffers, modules_called
from selftune.optim._checks import (
    check_dependence,
    check_group,
    check_outer_loss,
    check_params,
)
from selftune.optim._engine import ALONE, Engine
from selftune.optim._saving import check_state, pack, unpack
from selftune.optim._stepper import AbstractStepper, Grads
from selftune.probe import Probe, probe_steps
from selftune.schedules import Schedule
from selftune.tuning import Tuning
from selftune.update import Update

log = logging.getLogger("selftune")

Params = nn.Module | Iterable[Any]
Closure = Callable[[], Tensor]


class SelfTuned(torch.optim.Optimizer):
    """A torch optimizer whose hyperparameters tune themselves by gradient.

    Args:
        params: A module, parameters, named parameters or parameter groups, as for torch.
        defaults: torch's options of the optimizer, and ``decay``.
        update: The update whose hyperparameters are tuned.
        stepper: Takes the weight steps.
        tune: Names of the tuned hyperparameters; by default the rule's own choice, less the
            learning rate's decay where the horizon is known.
        per: ``"run"`` (one factor for all), ``"group"`` or ``"tensor"``, for all or by name.
        bounds: (lowest, highest) values by name.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``; by default
            linear to 0 if ``total_steps`` is given, else constant.
        total_steps: Steps in the whole run, if known.
        warmup_steps: Steps over which the learning rate climbs.
        estimator: How weights respond to hyperparameters.
        average: Where the outer loss is measured.
        hyper_optimizer: Makes the torch optimizer of the raw hyperparameters.
        every: Training steps from one hyperparameter step to the next, at least.
        probe: Whether the learning rate is probed at the start, or over how many steps.
        guard: Whether a run that blows up or worsens is rolled back.
        model: The model, if it has BatchNorm and ``params`` is not itself a module.
        log_dir: Folder for TensorBoard, or a ``SummaryWriter``.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        update: Update,
        stepper: AbstractStepper,
        *,
        tune: Sequence[str] | None = None,
        per: str | Mapping[str, str] = "run",
        bounds: Mapping[str, tuple[float, float]] | None = None,
        schedule: str | None = None,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        estimator: AbstractEstimator | None = None,
        average: Average | None = None,
        hyper_optimizer: HyperOptimizer = adam,
        every: int = 5,
        probe: bool | int = True,
        guard: bool = True,
        model: nn.Module | None = None,
        log_dir: str | Path | Any | None = None,
    ) -> None:
        if isinstance(params, nn.Module):
            model, params = params, params.named_parameters()
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self._schedule = Schedule(
            shape=schedule, total_steps=total_steps, warmup_steps=warmup_steps
        )
        if tune is None:
            known_end = total_steps is not None
            tune = [n for n in update.tuned if not (known_end and n == "decay")]
        tuning = Tuning(
            update.hparams, tune=tune, per=per, bounds=bounds, horizon=total_steps,
            make=hyper_optimizer,
        )  # fmt: skip
        self._update = update
        self._estimator = Trace() if estimator is None else estimator
        length = probe_steps(total_steps) if isinstance(probe, bool) else probe
        self._engine = Engine(
            tuning=tuning,
            averaging=Average() if average is None else average,
            every=every,
            probe=Probe(steps=length) if probe and "lr" in tune else None,
            guard=Guard() if guard else None,
            buffers=None if model is None else Buffers([model]),
            monitor=Monitor(log_dir),
            stepper=stepper,
            regularizers=update.regularizers,
        )
        self._mirror: dict[tuple[int, str], float] = {}
        self._tuned: list[dict[str, Any]] = []
        self._built: list[int] = []
        self._held: list[int] = []
        self._frozen: list[Tensor] = []
        self._told = False
        super().__init__(params, defaults)

    # torch's interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also in the middle of a run; what is tuned already stays tuned."""
        super().add_param_group(param_group)
        groups = self.param_groups
        try:
            options = {h.option or h.name for h in self._update.hparams.values()}
            check_group(groups[-1], sorted(options))
            check_params(
                named
                for i, g in enumerate(groups)
                for named in zip(self._names(i, g["params"]), g["params"], strict=True)
            )
        except ValueError:
            groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a weight step, as torch's optimizers do; returns the closure's loss.

        Raises:
            ValueError: A sparse gradient; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = self._blocks()
        found = [b.gradient() for b in blocks]
        grads = [
            (torch.zeros_like(b.average) if g is None else g, m)
            for b, (g, m) in zip(blocks, found, strict=True)
        ]
        if all(g is None for g, _ in found) or self._idle(grads):
            return loss
        self._take_up_changes()
        if self._engine.train(grads, self._values(), self._rates()):
            self._publish()
        self._advise()
        if loss is not None:
            self.report(loss)
        return loss

    def hyper_step(self, closure: Closure) -> Tensor | None:
        """Step the hyperparameters on a validation loss, measured at the averaged weights.

        May be called as often as validation batches are at hand: fewer than ``every`` training
        steps after the last one, and during the start-up probe, it returns at once. Gradients
        in ``.grad`` are left alone.

        Args:
            closure: Returns the validation loss, a scalar with its graph; no backward.

        Returns:
            The loss, detached, or None if no step was due.

        Raises:
            RuntimeError: No training step has been taken yet.
            TypeError: The closure does not return a tensor.
            ValueError: The loss is not a scalar, has no graph, depends on no parameter, or is
                not finite at the last good weights either.
        """
        engine, clock = self._engine, self._engine.clock
        if clock.steps == 0:
            raise RuntimeError(
                "hyper_step came before any step(): take at least one training step first"
            )
        clock.heard = clock.steps
        with torch.no_grad():
            blocks = self._blocks()
        if engine.buffers is None:
            with modules_called() as called:
                self._check_finite(self._outer(closure, [b.weights() for b in blocks])[0], closure)
            engine.buffers = Buffers(called)
        if engine.probing or clock.steps - max(clock.outer, clock.since) < engine.every:
            return None
        loss, grads = self._outer(closure, [b.average for b in blocks])
        value = float(loss)
        with torch.no_grad():
            if self._engine.outer_step(value, grads):
                self._publish()
            if value != value or value in (float("inf"), float("-inf")):
                self._check_finite(self._outer(closure, [b.good for b in blocks])[0], closure)
            if engine.monitor.on:
                rows = hyper_rows(loss, self.hparams, engine.tuning.signals())
                engine.monitor.scalars(rows, clock.steps)
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights, and their BatchNorm statistics, for evaluating and saving.

        Example:
            >>> import selftune as st
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = st.SGD(net, lr=0.1)
            >>> with opt.averaged():
            ...     output = net(torch.ones(1, 2))
        """
        with torch.no_grad():
            kept = self._show([b.average for b in self._blocks()])
        try:
            yield
        finally:
            with torch.no_grad():
                self._show(kept)

    def report(self, loss: Tensor | float) -> None:
        """Tell the training loss, for the log and the guard; optional.

        ``step(closure)`` does so by itself. A loss that is not finite three times in a row rolls
        back, as gradients that are not finite do.
        """
        engine = self._engine
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        engine.monitor.scalar("train/loss", value, engine.clock.steps)
        if engine.guard is None or value.is_cuda or not engine.blocks:
            return
        if engine.guard.training_loss(float(value)) == "rollback":
            with torch.no_grad():
                engine.roll_back("the training loss is not finite", worsened=False)
                self._publish()

    def flush(self) -> None:
        """Write what is buffered for the log; writing goes on by itself in blocks."""
        self._engine.monitor.flush()

    @property
    def hparams(self) -> dict[str, Any]:
        """Present values of all hyperparameters; a list where groups or tensors differ.

        The learning rate is the tuned peak, before schedules.
        """
        with torch.no_grad():
            self._blocks()
            self._take_up_changes()
        found: dict[str, Any] = {}
        for name, hparam in self._update.hparams.items():
            if name in self._engine.tuning.rows:
                values = self._engine.tuning.rows[name].values().tolist()
            else:
                values = [hparam.read(g) for g in self.param_groups]
            found[name] = values[0] if all(v == values[0] for v in values) else values
        return found

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the run's own state in its first parameter group."""
        with torch.no_grad():
            self._blocks()
        self._engine.stepper.expose(self.state)
        state = super().state_dict()
        groups = [dict(g) for g in state["param_groups"]]
        groups[0]["selftune"] = pack(self._engine, type(self._update.rule).__name__)
        return {**state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run, bit for bit on the CPU; a state that does not fit is refused whole.

        Raises:
            ValueError: Another rule, set of hyperparameters, number of groups or shapes.
        """
        self._blocks()
        rule = type(self._update.rule).__name__
        check_state(state_dict, self._engine, rule, self.param_groups)
        groups = [dict(g) for g in state_dict["param_groups"]]
        run = groups[0].pop("selftune")
        super().load_state_dict({**state_dict, "param_groups": groups})
        # torch casts state to the parameters' dtype; tangents of bfloat16 weights are float32.
        saved_order = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for index, param in zip(saved_order, params, strict=True):
            if index in state_dict["state"]:
                self.state[param] = dict(state_dict["state"][index])
        self._engine.stepper.adopt(self.state)
        self._built = []
        self._blocks()
        unpack(self._engine, run)
        self._publish(write=False)

    # inside

    def _names(self, index: int, params: Sequence[Tensor]) -> list[str]:
        """What to call some of a group's parameters in errors."""
        group = self.param_groups[index]
        places = {id(p): j for j, p in enumerate(group["params"])}
        given = group.get("param_names")
        return [
            str(given[places[id(p)]]) if given else f"param_groups[{index}][{places[id(p)]}]"
            for p in params
        ]

    def _blocks(self) -> list[Block]:
        """The blocks, built anew where parameters or their state were added or replaced."""
        sizes = [len(g["params"]) for g in self.param_groups]
        if sizes == self._built and not any(p.requires_grad for p in self._frozen):
            return self._engine.blocks
        trained = [
            [p for p in g["params"] if p.requires_grad or p in self.state]
            for g in self.param_groups
        ]
        engine = self._engine
        self._held = [i for i, t in enumerate(trained) if t]
        if not self._held:
            raise ValueError("params: none of the parameters requires a gradient")
        segments = [(i, self.param_groups[i]) for i in self._held for _ in trained[i]]
        start = {n: [self._start(n, g) for _, g in segments] for n in engine.tuning.rows}
        engine.tuning.lay_out(start, [i for i, _ in segments])
        engine.blocks = [
            Block(
                trained[i], self._names(i, trained[i]), [self.state[p] for p in trained[i]],
                self._update.rule, self._estimator, self._options(self.param_groups[i]),
                engine.tuning.names, self._update.regularizers, not engine.tuning.shared,
            )
            for i in self._held
        ]  # fmt: skip
        self._built = sizes
        self._frozen = [p for g in self.param_groups for p in g["params"] if p not in self.state]
        self._publish()
        return engine.blocks

    def _start(self, name: str, group: dict[str, Any]) -> float:
        if name == "lr" and "initial_lr" in group:
            return float(group["initial_lr"])
        return self._update.hparams[name].read(group)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group's options with all hyperparameters as numbers."""
        numbers = {n: h.read(group) for n, h in self._update.hparams.items()}
        return {**group, **numbers}

    def _values(self) -> list[dict[str, Any]]:
        """Options and present hyperparameters of every block."""
        return [
            {**self._options(self.param_groups[i]), **tuned, "index": i}
            for i, tuned in zip(self._held, self._tuned, strict=True)
        ]

    def _rates(self) -> list[float]:
        """The schedule's factor for every block, times that of a torch scheduler."""
        factor = self._schedule(self._engine.clock.steps)
        rates = []
        for i in self._held:
            group = self.param_groups[i]
            scheduled = "lr" in self._engine.tuning.rows and "initial_lr" in group
            rates.append(factor * float(group["lr"]) / group["initial_lr"] if scheduled else factor)
        return rates

    def _publish(self, write: bool = True) -> None:
        """Cache tuned values for the weight steps and show them in the parameter groups.

        Once a torch scheduler is attached (it leaves ``initial_lr``), a group's ``lr`` is the
        scheduler's to write, and the tuned factor multiplies it unseen.
        """
        engine = self._engine
        self._tuned, engine.slopes = [{} for _ in self._held], [{} for _ in self._held]
        for name, tuned in engine.tuning.rows.items():
            values, slopes = tuned.values().tolist(), tuned.slopes().tolist()
            start = 0
            for at, (i, block) in enumerate(zip(self._held, engine.blocks, strict=True)):
                part = slice(start, start + len(block.params))
                start = part.stop
                self._tuned[at][name] = block.layout.expand(values[part])
                engine.slopes[at][name] = block.layout.expand(slopes[part])  # type: ignore[index]
                group = self.param_groups[i]
                if write and not (name == "lr" and "initial_lr" in group):
                    shown = values[part]
                    tuned.hparam.write(group, sum(shown) / len(shown))
                self._mirror[i, name] = tuned.hparam.read(group)

    def _take_up_changes(self) -> None:
        """Take over hyperparameters that were set in the parameter groups from outside."""
        changed = False
        for name, tuned in self._engine.tuning.rows.items():
            start = 0
            for i, block in zip(self._held, self._engine.blocks, strict=True):
                group = self.param_groups[i]
                segments = range(start, start + len(block.params))
                start += len(block.params)
                value = tuned.hparam.read(group)
                if value == self._mirror[i, name] or (name == "lr" and "initial_lr" in group):
                    continue
                tuned.rebase(segments, value)
                changed = True
        if changed:
            self._publish(write=False)

    def _idle(self, grads: Grads) -> bool:
        """Whether this is the empty step by which checkpointing makes torch create state."""
        still = all(float(g["lr"]) == 0 for g in self.param_groups)
        return still and not any(bool(g.any()) for g, _ in grads)

    def _show(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Put other weights, and the other BatchNorm statistics, in place; returns the present."""
        blocks = self._engine.blocks
        kept = [b.weights() for b in blocks]
        for block, flat in zip(blocks, weights, strict=True):
            block.layout.write(flat, block.params)
        if self._engine.buffers is not None:
            self._engine.buffers.exchange()
        return kept

    def _outer(self, closure: Closure, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The closure's loss and its joined gradients at other weights."""
        blocks = self._engine.blocks
        with torch.no_grad():
            kept = self._show(weights)
        try:
            with torch.enable_grad():
                loss = closure()
            check_outer_loss(loss)
            params = [p for b in blocks for p in b.params]
            leaves = [p for p in params if p.requires_grad]
            grads = dict(
                zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
            )
        finally:
            with torch.no_grad():
                self._show(kept)
        check_dependence(list(grads.values()))
        joined = [
            b.layout.flatten(
                [torch.zeros_like(p) if (g := grads.get(p)) is None else g for p in b.params]
            )
            for b in blocks
        ]
        return loss.detach(), joined

    def _check_finite(self, loss: Tensor, closure: Closure) -> None:
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"closure returned {float(loss)} at weights that were good so far; check the "
                "validation batch and loss for overflow, log(0) or missing values"
            )

    def _advise(self) -> None:
        clock, tuning = self._engine.clock, self._engine.tuning
        stay = sorted(self._update.regularizers & set(tuning.names))
        if not self._told and stay and clock.steps - clock.heard > ALONE:
            self._told = True
            log.warning(
                "no hyper_step in %d steps: training gradients tune the learning rate; %s stay as "
                "given. Call opt.hyper_step(lambda: loss on a validation batch) to tune them.",
                ALONE, ", ".join(stay),
            )  # fmt: skip
