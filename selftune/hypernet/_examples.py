"""A perturbation of each example: hooks that add its effect to the outputs of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selftune._modes import evaluating
from selftune.hypernet._places import Place
from selftune.hypernet._terms import primal, term_of

if TYPE_CHECKING:
    from selftune.hypernet.conversion import SelfTuned

WIDTH = 0.5
"""Standard deviation of the gains U with which both kinds of perturbation are compared."""
TOLERANCE = 0.02
"""Largest difference of the two outputs, relative to the effect of the perturbation."""


class AddTerm:
    """The forward hook of a layer, which adds ``J δ`` of each example to its output.

    An object and not a closure, so that a copy of the model has hooks of its own.
    """

    def __init__(self, net: SelfTuned, places: Mapping[str, Place]) -> None:
        self.net, self.places = net, dict(places)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output with the term, or None outside a perturbed pass."""
        net, term = self.net, term_of(module)
        if net.delta is None:
            return None
        assert term is not None
        known = {a: net.tensors(p) for a, p in self.places.items()}
        x = primal(args[0]) if net.linear else args[0]
        return output + term(module, x, known, net.delta)


def hooks_of(net: SelfTuned, places: list[Place]) -> list[Any]:
    """Register a hook for each layer with sensitivities; return the handles."""
    by_module: dict[nn.Module, dict[str, Place]] = {}
    for place in places:
        for module, attribute in place.users:
            by_module.setdefault(module, {})[attribute] = place
    return [m.register_forward_hook(AddTerm(net, known)) for m, known in by_module.items()]


def difference(net: SelfTuned, args: Any, kwargs: Any) -> str:
    """Why the model has other outputs with perturbations of each example; "" if it has not.

    Compares two passes in evaluation mode at the same δ, once of the whole batch and once of each
    example. A parameter that is used outside the forward of its layer, such as tied weights in
    ``F.linear``, does not respond to the latter.
    """
    gains = list(net.gains.values())
    kept = [g.detach().clone() for g in gains]
    buffers = [(b, b.clone()) for b in net.model.buffers()]
    device = net.raw.device
    generator = torch.Generator().manual_seed(0)
    try:
        with evaluating(net), torch.no_grad():
            for gain in gains:
                gain.copy_(torch.randn(gain.shape, generator=generator) * WIDTH)
            delta = torch.full_like(net.raw.detach(), net.unit)
            outputs = []
            for move in (delta, delta.expand(net.batch_size(args, kwargs), -1), 0 * delta):
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    outputs.append(net.at(move, args, kwargs))
            return _compared(*map(_flat, outputs))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        with torch.no_grad():
            for gain, before in zip(gains, kept, strict=True):
                gain.copy_(before)
            for buffer, old in buffers:
                buffer.copy_(old)


def _flat(output: Any) -> Tensor:
    parts = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([p.reshape(-1).double() for p in parts]) if parts else torch.zeros(0)


def _compared(whole: Tensor, each: Tensor, still: Tensor) -> str:
    rounding = 100 * torch.finfo(torch.get_default_dtype()).eps * still.norm()
    if float((each - whole).norm()) <= TOLERANCE * float((whole - still).norm()) + float(rounding):
        return ""
    return "some parameters are used outside the forward of their layer"
