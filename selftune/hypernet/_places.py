"""The parameters of a model with learned sensitivities, and where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from selftune.hypernet._terms import WHOLE, term_of
from selftune.nn import DropConnect


@dataclass(frozen=True)
class Report:
    """The result of a conversion for each parameter.

    Attributes:
        responding: Names of parameters with sensitivities to the hyperparameters.
        plain: Names of the others, with the reason.
        per_example: Whether each example has its own perturbation.
    """

    responding: tuple[str, ...]
    plain: Mapping[str, str]
    per_example: bool

    def __str__(self) -> str:
        unit = "example" if self.per_example else "batch"
        lines = [f"{len(self.responding)} parameters respond, perturbed once per {unit}"]
        return "\n".join([*lines, *(f"plain: {n} ({why})" for n, why in self.plain.items())])


class Place:
    """A parameter with a sensitivity, and the layers that use it."""

    def __init__(self, name: str, param: nn.Parameter) -> None:
        self.name, self.shape = name, param.shape
        self.key = name.replace(".", "/")  # ParameterDict keys must not contain dots
        self.users: list[tuple[nn.Module, str]] = []


def places_of(model: nn.Module) -> tuple[list[Place], dict[str, str], bool]:
    """Parameters with and without support; whether each example can have its own perturbation."""
    places: dict[int, Place] = {}
    plain: dict[str, str] = {}
    # Dropped weights are the same for all examples, at one rate.
    alone = not any(isinstance(module, DropConnect) for module in model.modules())
    kinds: dict[int, set[bool]] = {}
    for path, module in model.named_modules():
        # The module, or the module whose parametrization it is part of.
        host = model.get_submodule(path.partition(".parametrizations")[0])
        term = term_of(host)
        knows = term is not None or isinstance(host, WHOLE)
        for attribute, param in module.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            name = f"{path}.{attribute}" if path else attribute
            kinds.setdefault(id(param), set()).add(knows)
            if len(kinds[id(param)]) == 2:
                other = places[id(param)].name if id(param) in places else name
                raise ValueError(
                    f"{name} is shared between layers, and only one of them can "
                    f"respond ({other}): give each its own parameter, or freeze it"
                )
            if not knows:
                plain[name] = f"{type(host).__name__} is not supported"
                continue
            place = places.setdefault(id(param), Place(name, param))
            place.users.append((module, attribute))
            alone &= term is not None and host is module
    return list(places.values()), plain, alone
