"""Stand-in for ``opt.eval()`` and ``opt.train()`` while the optimizers lack them.

Does nothing as soon as :class:`~selftune.optim.SelfTuningOptimizer` has ``eval``; then this file
can go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selftune.optim import SelfTuningOptimizer

KEPT = "_training_weights"  # attribute of an optimizer in eval mode, key of a state saved then


def provide_modes() -> None:
    """Give self-tuned optimizers ``eval`` and ``train``, and states that hold both weights."""
    kind: Any = SelfTuningOptimizer
    if hasattr(kind, "eval"):
        return
    save, load = kind.state_dict, kind.load_state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        state: dict[str, Any] = save(self)
        if KEPT in vars(self):
            weights = [[t.clone() for t in tensors] for tensors in vars(self)[KEPT]]
            state["param_groups"][0]["selftune"][KEPT] = weights
        return state

    @torch.no_grad()
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        vars(self).pop(KEPT, None)
        kept = state_dict["param_groups"][0]["selftune"].get(KEPT)
        if kept is not None:  # in eval mode again: the model may be loaded before or after this
            vars(self)[KEPT] = [[t.clone() for t in tensors] for tensors in kept]

    kind.eval, kind.train = _eval, _train
    kind.state_dict, kind.load_state_dict = state_dict, load_state_dict


@torch.no_grad()
def _eval(opt: Any) -> None:
    """Put the averaged weights into the model; idempotent."""
    if KEPT in vars(opt):
        return
    kept = [[t.detach().clone() for t in tensors] for tensors in _tensors(opt)]
    with opt.averaged():
        shown = [[t.detach().clone() for t in tensors] for tensors in _tensors(opt)]
    _write(opt, shown)
    vars(opt)[KEPT] = kept


@torch.no_grad()
def _train(opt: Any) -> None:
    """Put the training weights back into the model; idempotent."""
    if KEPT in vars(opt):
        _write(opt, vars(opt).pop(KEPT))


def _tensors(opt: Any) -> list[list[Tensor]]:
    """The parameters, and the running statistics of BatchNorm layers known so far."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [params, opt._engine.buffers.tensors()]


def _write(opt: Any, values: list[list[Tensor]]) -> None:
    for tensors, saved in zip(_tensors(opt), values, strict=True):
        for tensor, value in zip(tensors, saved, strict=False):
            tensor.copy_(value)
