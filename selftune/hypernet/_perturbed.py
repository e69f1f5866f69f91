"""A model with sensitivities of its weights to perturbations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selftune._binding import functional_call
from selftune.estimators._structured import Structured, unknown
from selftune.hypernet._places import Place


class PerturbedModel(nn.Module):
    """A model whose weights are ``w + J δ``, where δ is a perturbation of raw hyperparameters.

    Attributes:
        raw: The unconstrained hyperparameters z, shape (hyperparameters,).
        unit: Unit of δ in U and C, chosen so that they learn as fast as the weights.
        delta: δ of each example in a pass with hooks, else None.
        linear: Whether the pass is one of :meth:`linearised`.
    """

    def __init__(self, model: nn.Module, raw: Tensor, places: list[Place], unit: float) -> None:
        super().__init__()
        self.model = model
        self.raw = nn.Parameter(raw)
        self.unit = unit
        self._places = places
        self.gains, self.rows = nn.ParameterDict(), nn.ParameterDict()
        named = dict(model.named_parameters())
        for place in places:
            start = unknown(named[place.name].detach(), len(raw))
            self.gains[place.key] = nn.Parameter(start.gains)
            if not start.free:
                self.rows[place.key] = nn.Parameter(start.rows)
        self.delta: Tensor | None = None  # of each example, while a pass with hooks is under way
        self.linear = False

    def at(
        self, delta: Tensor, args: Any, kwargs: Any, tensors: Mapping[str, Tensor] | None = None
    ) -> Any:
        """The output of the model with weights ``w + J δ`` and the current strengths.

        δ has shape (batch, hyperparameters) or (hyperparameters,); ``tensors`` replace ``w + J δ``.
        """
        tensors_now = self.strengths() if self.training else {}
        if delta.ndim == 1:
            tensors_now |= self.moved(delta) if tensors is None else tensors
            return functional_call(self.model, tensors_now, args, kwargs)
        self.delta = delta / self.unit
        try:
            return functional_call(self.model, tensors_now, args, kwargs)
        finally:
            self.delta = None

    def strengths(self) -> dict[str, Tensor]:
        """The strength buffers of a training pass by name: none."""
        return {}

    def moved(self, delta: Tensor) -> dict[str, Tensor]:
        """The parameters ``w + J δ`` by name."""
        named = dict(self.model.named_parameters())
        move = delta / self.unit
        moved = {}
        for place in self._places:
            param, gain = named[place.name], self.gains[place.key] @ move
            if place.key in self.rows:
                rows = self.rows[place.key].view(place.shape)
                gain = gain.view(-1, *[1] * (param.ndim - 1))
                moved[place.name] = torch.addcmul(param, gain, rows)  # in one pass
            else:
                moved[place.name] = param + gain.view(place.shape)
        return moved

    def along(self, place: Place, delta: Tensor) -> Tensor:
        """J δ of a parameter."""
        gains, rows = self.tensors(place)
        return Structured(gains, rows, gains).along(delta / self.unit, place.shape)

    @contextmanager
    def linearised(self) -> Iterator[None]:
        """Passes at δ = 0, in which sensitivities only enter through tangents in δ."""
        self.linear = True
        try:
            yield
        finally:
            self.linear = False

    def tensors(self, place: Place) -> tuple[Tensor, Tensor]:
        """U and V of a parameter; C and an empty matrix of a vector."""
        gains = self.gains[place.key]
        return gains, self.rows[place.key] if place.key in self.rows else gains[:, :0]

    def batch_size(self, args: Any, kwargs: Any) -> int:
        """Number of examples: the length of the first tensor among the arguments."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim:
                return len(value)
        raise ValueError(
            "no argument of the model is a tensor with a batch dimension: use perturb='batch'"
        )
