"""A perturbation of each example: hooks that add its effect to the outputs of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selftune._modes import buffers_kept, evaluating, random_kept
from selftune.hypernet._perturbed import PerturbedModel
from selftune.hypernet._places import Place
from selftune.hypernet._terms import primal, term_of

WIDTH = 0.5
"""Standard deviation of the gains U with which both kinds of perturbation are compared."""
TOLERANCE, ROUNDING = 0.02, 10.0
"""Largest difference of the two outputs, relative to the effect of the perturbation, and to the
rounding error of the outputs."""


class AddTerm:
    """The forward hook of a layer, which adds ``J δ`` of each example to its output.

    An object and not a closure, so that a copy of the model has hooks of its own.
    """

    def __init__(self, net: PerturbedModel, places: Mapping[str, Place]) -> None:
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


def hooks_of(net: PerturbedModel, places: list[Place]) -> list[Any]:
    """Register a hook for each layer with sensitivities; return the handles."""
    by_module: dict[nn.Module, dict[str, Place]] = {}
    for place in places:
        for module, attribute in place.users:
            by_module.setdefault(module, {})[attribute] = place
    return [m.register_forward_hook(AddTerm(net, known)) for m, known in by_module.items()]


def difference(net: PerturbedModel, args: Any, kwargs: Any) -> str | None:
    """Why the model has other outputs with perturbations of each example; "" if it has not.

    Compares two passes in evaluation mode at the same δ, once of the whole batch and once of each
    example. A parameter that is used outside the forward of its layer, such as tied weights in
    ``F.linear``, does not respond to the latter. None if the next pass must tell: the model fails
    on this input, or no output is finite.
    """
    gains = {n: torch.zeros_like(g) for n, g in net.gains.items()}
    generator = torch.Generator().manual_seed(0)
    for gain in gains.values():
        gain.copy_(torch.randn(gain.shape, generator=generator, device="cpu") * WIDTH)
    delta = next(net.model.parameters()).new_full(net.raw.shape, net.unit)
    each = delta.expand(net.batch_size(args, kwargs), -1)

    def output(move: Tensor) -> Tensor:
        with random_kept(delta.device):
            return _flat(net.at(move, args, kwargs))

    kept = net.gains
    with evaluating(net), torch.no_grad(), buffers_kept(net.model.modules()):
        try:
            net.gains = nn.ParameterDict(gains)
            whole, again, still = output(delta), output(delta), output(0 * delta)
        except Exception:  # the pass itself will raise it
            return None
        else:
            try:
                return _compared(whole, again, output(each), still, _precision(net, whole))
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                return first_line(error)
        finally:
            net.gains = kept


def first_line(error: Exception) -> str:
    """Type and first line of an error, as a reason."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _precision(net: PerturbedModel, output: Tensor) -> float:
    """Machine precision of the coarsest type among parameters and output."""
    types = {p.dtype for p in net.parameters()} | {output.dtype}
    if torch.is_autocast_enabled(net.raw.device.type):
        types.add(torch.get_autocast_dtype(net.raw.device.type))
    return max(torch.finfo(t).eps for t in types)


def _flat(output: Any) -> Tensor:
    parts = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([p.reshape(-1) for p in parts]) if parts else torch.zeros(0)


def _compared(
    whole: Tensor, again: Tensor, each: Tensor, still: Tensor, precision: float
) -> str | None:
    fine = whole.isfinite() & still.isfinite() & each.isfinite()
    whole, again, each, still = (t[fine].double() for t in (whole, again, each, still))
    if not fine.any():
        return None
    effect = float((whole - still).norm())
    allowed = TOLERANCE * effect + ROUNDING * precision * float(still.norm())
    random = float((again - whole).norm()) > allowed  # nothing follows from a difference then
    if random or float((each - whole).norm()) <= allowed:
        return ""
    return "some parameters are used outside the forward of their layer"
