"""The interface of a torch optimizer: groups, state, saving and copies."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from selftune._modes import ordinary_tensors
from selftune.optim._assembly import Assembly, match_names, named
from selftune.optim._block import Block
from selftune.optim._checks import check_group, check_params
from selftune.optim._engine import Engine
from selftune.optim._groups import Groups
from selftune.optim._logging import OptimizerLog
from selftune.optim._saving import check_state, pack, to_bytes, unpack
from selftune.optim._shown import Restored
from selftune.update import Update

log = logging.getLogger("selftune")
HOOKS = (
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Attributes of a torch optimizer whose hooks see the complete state, with that of the run."""


class Container(torch.optim.Optimizer):
    """A torch optimizer around an engine, whose blocks follow its parameter groups.

    Attributes are set by subclasses, before they call ``torch.optim.Optimizer.__init__``.
    """

    _update: Update
    _kind: str
    _engine: Engine
    _groups: Groups
    _log: OptimizerLog
    _assembly: Assembly
    _state: Any

    @property
    def state(self) -> Any:
        """Per-parameter state, updated on access."""
        for block in self._engine.blocks:
            block.sync()
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        for block in self._engine.blocks:
            block.sync()  # so that the next call sees what has changed
        self._state = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, with ``state`` stored as ``_state``, because it is a property here."""
        own = dict(state)
        if "state" in own:  # torch bypasses the property
            own["_state"] = own.pop("state")
        super().__setstate__(own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, at any time; tuned values of the other groups do not change.

        Its ``"params"`` may be a module. Names are added or left out as in the other groups.
        """
        derived = "lr" in param_group
        param_group = match_names(self.param_groups, param_group)
        with warnings.catch_warnings():  # torch only warns about duplicate parameters
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate")
            super().add_param_group(param_group)
        groups = self.param_groups
        group = groups[-1]
        try:
            check_group(group, self._update.hparams.values())
            check_params(named(groups))
        except ValueError:
            groups.pop()
            raise
        for key, value in group.items():
            if isinstance(value, Tensor):  # groups share their defaults' tensors
                group[key] = value.detach().clone()
        groups[0].setdefault("selftune", None)  # flattened checkpoints look for keys here
        for key in ("peak_lr", "applied_lr"):
            group.setdefault(key, float(group["lr"]))
        if derived and not self._assembly.empty:
            self._warn_of_tuned_rate(group)

    def _warn_of_tuned_rate(self, group: Mapping[str, Any]) -> None:
        """Warn if the tuned factor lifts a new group's rate above those of all others."""
        rate = self._engine.shifts.rows.get("lr")
        if rate is None:
            return
        peaks = rate.values()
        new = float(group["lr"]) * float(peaks.max()) / max(rate.start)
        if new > float(peaks.max()):
            log.warning(
                "%s: the new group's lr=%.3g is multiplied by the tuned factor of the others, to "
                "%.3g, above their %.3g. Pass a rate on the scale of those that the optimizer was "
                "given, not one computed from param_groups, which hold tuned rates",
                self._engine.controller.label, float(group["lr"]), new, float(peaks.max()),
            )  # fmt: skip

    @property
    def sweeping(self) -> bool:
        """Whether the learning-rate sweep is running; the run then returns to its lowest loss.

        Gradients of its steps are at weights that are left again: skip them in measurements of your
        own.
        """
        return self._engine.controller.sweeping

    @property
    def hparams(self) -> dict[str, Any]:
        """Current values of all hyperparameters; a list if groups or tensors differ.

        The learning rate is the tuned peak, before schedules.
        """
        with torch.no_grad():
            if not self._assembly.empty:  # before the first step the groups hold the values
                self._blocks()
                self._take_up()
        return self._groups.present(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the run's own state in its first parameter group.

        Inside ``averaged()`` and after ``eval()`` it also contains the training weights.

        Raises:
            RuntimeError: Called inside the closure of ``hyper_step``.
        """
        shown = self._engine.shown
        if shown is None and self._engine.buffers.shown:
            raise RuntimeError("state_dict() inside the closure of hyper_step: call it afterwards")
        with torch.no_grad():
            self._blocks()
        self._engine.stepper.expose(self.state)
        self._engine.monitor.flush()  # a killed run resumes after these rows
        with self._hooks_left_out():
            state = super().state_dict()
        groups = [dict(g) for g in state["param_groups"]]
        groups[0]["selftune"] = to_bytes(self._packed())
        entries = dict(state["state"])
        order = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        places = {p: index for index, p in enumerate(order)}
        for block in self._engine.blocks:
            for param, saved in zip(block.params, block.saved(), strict=True):
                entries[places[param]] = {**entries[places[param]], **saved}
        for param, weights in self._engine.training_weights():
            entries[places[param]]["training"] = weights
        state = {**state, "state": entries, "param_groups": groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def _trained_before(self, state_dict: Mapping[str, Any]) -> None:
        """Count parameters that have been frozen since they were trained, as the saved run does."""
        saved, groups = state_dict.get("param_groups", ()), self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
            return  # an error follows
        indices = itertools.chain.from_iterable(g["params"] for g in saved)
        params = itertools.chain.from_iterable(g["params"] for g in groups)
        for param, index in zip(params, indices, strict=True):
            if "average" in state_dict["state"].get(index, ()):
                self._state[param]  # makes the entry

    def _packed(self) -> dict[str, Any]:
        return pack(self._engine, self._groups, self._log, self._kind)

    @ordinary_tensors()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run, bit for bit on a CPU.

        A state saved inside ``averaged()``, or after ``eval()``, restores the training weights in
        the model; if the model's state is loaded after it, ``train()`` does so. Loading ends
        ``averaged()`` and ``eval()``: the training weights are restored, unless the model's state
        was loaded in between.

        Raises:
            ValueError: The state has another rule, other hyperparameters, groups or shapes; nothing
                is loaded.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        if self._assembly.empty:
            self._trained_before(state_dict)
        # Not _blocks(): a distributed checkpoint has been read into the tensors of state_dict(),
        # which are averages of this run, and must not be reset.
        self._assembly.current(self.param_groups, self.state)
        run = check_state(state_dict, self._engine, self._packed(), self.param_groups)
        shown, self._engine.shown = self._engine.shown, None
        if shown is not None:
            shown.back(keep=shown.changed)
        groups = [dict(g) for g in state_dict["param_groups"]]
        groups[0]["selftune"] = None
        with self._hooks_left_out():
            super().load_state_dict({**state_dict, "param_groups": groups})
        # torch casts state to the parameters' dtype; sensitivities of bfloat16 weights are float32.
        saved_order = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for index, param in zip(saved_order, params, strict=True):
            if index in state_dict["state"]:
                self.state[param] = dict(state_dict["state"][index])
        training = {p: e.pop("training") for p, e in self._state.items() if "training" in e}
        self._engine.stepper.adopt(self.state, self.param_groups)
        self._assembly.make(self.param_groups, self.state)
        unpack(self._engine, self._groups, run)
        buffers = self._engine.buffers
        restored = Restored([*training], [*training.values()], buffers) if training else None
        self._engine.restored = restored
        self._engine.store.cached = self._groups.cache(self.param_groups, self._engine.blocks)
        self._log.load_state_dict(run["log"])
        values = self._groups.present(self.param_groups)
        self._log.resume(values, self._engine.clock.steps, begun=self._engine.first_loss_seen)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @contextmanager
    def _hooks_left_out(self) -> Iterator[None]:
        """Lets torch save and load without the user's hooks, which see the complete state."""
        hooks = {name: vars(self)[name] for name in HOOKS}
        vars(self).update({name: OrderedDict() for name in HOOKS})
        try:
            yield
        finally:
            vars(self).update(hooks)

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, which rebuilds blocks from the state; schedulers wrap ``step`` again."""
        with torch.no_grad():
            self._blocks()
            self._take_up()
        engine = copy.copy(self._engine)
        engine.store = copy.copy(engine.store)
        engine.store.blocks = []
        if engine.whole is not None:
            engine.whole = engine.whole.anew()
        assembly = self._assembly.over(engine)
        own = {**self.__dict__, "state": self.state, "_engine": engine, "_assembly": assembly}
        return {k: v for k, v in own.items() if k != "step" and not _holds_hooks(k)}

    # internals

    def _blocks(self) -> list[Block]:
        blocks = self._assembly.current(self.param_groups, self._state)
        if self._engine.clock.steps == 0:  # until then weights may still be loaded
            self._engine.begin()
        return blocks

    def _stepped(self) -> None:
        """Called after a weight step; does nothing unless an optimizer chooses its rule."""

    def _take_up(self) -> None:
        if self._groups.take_up(self.param_groups):
            self._publish()

    def _publish(self) -> None:
        self._assembly.publish(self.param_groups)


def _holds_hooks(name: str) -> bool:
    """Whether an attribute of a torch optimizer holds hooks, which copies do not have."""
    return name.startswith("_optimizer_") and name.endswith("_hooks")
