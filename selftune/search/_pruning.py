"""Models that start at their largest sizes and lose units and blocks during a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from selftune._arguments import Number, check
from selftune._modes import modes_kept
from selftune.search._shape import size_of
from selftune.structure import Attention, Gate, Goal, Optional, gated, prune
from selftune.structure._sizes import KINDS, Sizes
from selftune.structure._tracing import original
from selftune.tuner import Progress
from selftune.tuner._batch import to_device
from selftune.tuner._data import own_iterator
from selftune.tuner._objective import TARGETS, Objective

INSIDE = {"budget": 0.5, "of": "multiply_adds"}
"""Arguments of :class:`~selftune.structure.Goal` for ``structure="inside"``."""
ALLOWED = ("budget", "end", "of", "tolerance")
"""Arguments of :class:`~selftune.structure.Goal` that ``structure=`` accepts."""
END, LATE = 0.2, 0.5
"""Fractions of the run before units are removed: to a budget, or within a tolerance, which a model
that has not learned yet would hardly limit."""
FEW = 4
"""Number of validation batches for the saliencies of units."""
ABOVE = 1.1
"""Smallest default budget, relative to the model with one unit in each layer."""
MASK = "mask of "
"""Prefix of the names of masks; names of parameters contain no space."""


def settings_of(structure: Any) -> dict[str, Any] | None:
    """The arguments of the goal, from the argument ``structure`` of ``select``."""
    if structure is None:
        return None
    wrong = set(structure) - set(ALLOWED) if isinstance(structure, Mapping) else None
    if wrong or (wrong is None and structure != "inside"):
        raise ValueError(
            f"structure={structure!r} must be 'inside', a mapping with some of "
            f"{', '.join(ALLOWED)} as for selftune.structure.Goal, or None"
        )
    given = {} if structure == "inside" else dict(structure)
    if "of" in given and not isinstance(given["of"], str):
        given["of"] = list(given["of"])  # as a storage returns it
    kinds = given.get("of", KINDS)
    if not kinds or set([kinds] if isinstance(kinds, str) else kinds) - set(KINDS):
        raise ValueError(f"structure: of={kinds!r} must be one of {', '.join(KINDS)}, or both")
    end = given.setdefault("end", LATE if "tolerance" in given else END)
    check({"structure: end": Number(above=0, below=1)}, {"structure: end": end})
    return given


def start_wide(model: Any, family: str) -> None:
    """Check that a model has gates, and exclude them from training: they stay 1 until closed."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"candidates[{family!r}] returned a {type(model).__name__}: with structure= it must "
            "return the model, whose units are removed during its run; or omit structure="
        )
    gated_modules = [module for _, module in gated(model)]
    if not gated_modules:
        raise ValueError(
            f"candidates[{family!r}] built a model without gates: with structure= its builder "
            "takes space.suggest_width and places space.gates(width) after the activation; or "
            "omit structure="
        )
    for module in gated_modules:
        module.gates.requires_grad_(False)


def until(step: float) -> Callable[[Progress], bool]:
    """A callback of the tuner that ends the run at the first evaluation at or after a step."""
    return lambda progress: progress.step >= step


def evaluations(given: int | None, train: Any, steps: int, end: float) -> int:
    """Steps between evaluations of the wide model, at most its number of steps."""
    every = size_of(train) or max(1, steps // 10)
    return max(1, min(given or every, round(end * steps)))


def close(
    model: nn.Module, objective: Objective, val: Iterable[Any], settings: Mapping[str, Any]
) -> None:
    """Close units and blocks of a trained model until a goal is met."""
    few = list(islice(own_iterator(val), FEW))
    if not few:
        raise ValueError("val has no batches: units cannot be judged by validation loss")
    example, device = example_of(few[0], model), next(model.parameters()).device
    asked = dict(settings)
    if not {"budget", "tolerance"} & set(asked):
        asked = {**INSIDE, **asked}
        sizes = Sizes(model, example)
        counted = [k in asked["of"] for k in KINDS]
        least = float((sizes.floor() / sizes.whole)[counted].max())
        asked["budget"] = min(1.0, max(asked["budget"], ABOVE * least))
    goal = Goal(model, example, batches=len(few), start=0.0, **asked)
    batches = cycle(few)

    def loss() -> Tensor:
        return torch.as_tensor(objective(to_device(next(batches), device)))

    gates = [module.gates for _, module in gated(model)]
    with modes_kept(objective):
        objective.eval()  # units are compared without dropout, on running statistics
        for gate in gates:
            gate.requires_grad_(True)  # for saliencies only
        goal.close(loss, 1.0)
        for gate in gates:
            gate.requires_grad_(False)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks of all gates, by the name of their module, with a prefix."""
    return {MASK + name: module.mask.cpu().clone() for name, module in gated(model)}


def recut(model: nn.Module, weights: dict[str, Any], train: Iterable[Any]) -> nn.Module:
    """A newly built model, pruned by the masks in ``weights``, with the weights loaded."""
    masks = {n.removeprefix(MASK): m for n, m in weights.items() if n.startswith(MASK)}
    if masks:
        for name, module in gated(model):
            module.mask.copy_(masks[name])
        model = prune(model, example_of(next(iter(train)), model), threshold=0.0)
    model.load_state_dict({n: w for n, w in weights.items() if not n.startswith(MASK)})
    return model


def sizes_of(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Number of units left in each gated layer, heads in each attention, and blocks.

    Layers inside a removed block are left out. ``small`` is the model without closed units.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), Gate(8), Optional(nn.Linear(8, 8)))
        >>> sizes_of(net, nn.Linear(4, 8))
        {'units': [8], 'blocks': 1, 'parameters': 40}
    """
    modules = dict(gated(model))
    optional = {n for n, m in modules.items() if isinstance(m, Optional)}
    removed = tuple(f"{n}." for n in optional if bool(modules[n].closed().all()))
    sizes: dict[str, Any] = {"units": [], "heads": []}
    for name, module in modules.items():
        if name in optional or name.startswith(removed):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        kind = "heads" if isinstance(parent, Attention) and isinstance(module, Gate) else "units"
        sizes[kind].append(max(1, int((~module.closed()).sum())))
    sizes = {kind: counts for kind, counts in sizes.items() if counts}
    left = [n for n in optional if not f"{n}.".startswith(removed)]
    sizes |= {"blocks": len(left)} if optional else {}
    return sizes | {"parameters": sum(p.numel() for p in small.parameters())}


def example_of(batch: Any, model: nn.Module) -> tuple[Any, ...]:
    """The inputs of a batch, two examples of each, on the device of a model.

    Those of a dictionary are in the order of the arguments of ``forward``, with the defaults of
    arguments in between that a batch does not have.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        target = next((name for name in TARGETS if name in batch), None)
        signature = inspect.signature(original(model).forward)
        entries = {name: value for name, value in batch.items() if name != target}
        known = list(signature.parameters.values())
        last = max((i for i, param in enumerate(known) if param.name in entries), default=-1)
        inputs = [entries.pop(param.name, param.default) for param in known[: last + 1]]
        if entries or any(value is inspect.Parameter.empty for value in inputs):
            raise ValueError(
                "structure= passes batches to the model by position, but forward"
                f"{signature} does not take {sorted(map(str, batch))}: name them as its arguments"
            )
    else:
        inputs = list(batch[:-1])
    return tuple(to_device(t[:2] if isinstance(t, Tensor) else t, device) for t in inputs)
