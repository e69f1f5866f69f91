"""Conversion of a model to a hypernetwork whose inputs are its hyperparameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selftune._arguments import MAPPING, MODULE, NONE, Number, OneOf, checked
from selftune._binding import functional_call
from selftune._modes import buffers_kept, evaluating, random_kept
from selftune.hparams import Hparam, penalty_hparam
from selftune.hypernet._examples import difference, first_line, hooks_of
from selftune.hypernet._perturbed import PerturbedModel
from selftune.hypernet._places import Place, Report, places_of
from selftune.hypernet._terms import term_of
from selftune.nn import Tunable, own_counters, tunables

log = logging.getLogger("selftune")

PERTURBATIONS = ("auto", "example", "batch")


@checked(model=MODULE, hparams=MAPPING | NONE, perturb=OneOf(PERTURBATIONS), scale=Number(above=0))
def convert(
    model: nn.Module,
    hparams: Mapping[str, float] | None = None,
    *,
    perturb: str = "auto",
    scale: float = 0.5,
) -> SelfTuned:
    """Convert a model to one whose weights are a function of its hyperparameters.

    ``w(z + δ) = w + diag(U δ) V`` for each weight matrix and ``w + C δ`` for each vector, where δ
    is the perturbation of the raw hyperparameters. The converted model is called like the original.
    It supports Linear, (transposed) convolutions, embeddings, BatchNorm, GroupNorm, LayerNorm, RNN,
    GRU, LSTM, MultiheadAttention, tied and parametrised weights; other layers stay unchanged and
    are listed in ``report``.

    Args:
        model: Any module; it is not copied.
        hparams: Initial values by name: of strengths in :mod:`selftune.nn` layers, or of penalties
            that the loss reads with ``net.value(name)``. By default all strengths of the layers.
        perturb: ``"example"`` for a separate perturbation of each example, ``"batch"`` for a common
            one; ``"auto"`` for the former if all layers support it and the first training pass
            confirms it. Penalties are perturbed once per batch.
        scale: Initial σ of the perturbations, in raw (log or log-odds) space.

    Raises:
        ValueError: There is nothing to tune, a value is outside its bounds, or no layer is
            supported.

    Examples:
        >>> import torch, selftune as st
        >>> model = torch.nn.Sequential(st.nn.Dropout(0.2), torch.nn.Linear(4, 2))
        >>> net = st.hypernet.convert(model)
        >>> net(torch.randn(8, 4)).shape, round(net.hparams()["dropout"], 6)
        (torch.Size([8, 2]), 0.2)
        >>> net.revert() is model
        True

    Source: MacKay et al. 2019 (STN); centred as in Bae & Grosse 2020 (Δ-STN).
    """
    if isinstance(model, SelfTuned):
        raise ValueError("model is already converted: revert() it first")
    strengths = tunables(model)
    given = {n: f.value for n, f in strengths.items()} if hparams is None else dict(hparams)
    known = {n: strengths[n].hparam if n in strengths else penalty_hparam(n) for n in given}
    if not given:
        raise ValueError(
            "model holds no hyperparameter: add layers of selftune.nn, or name penalties "
            "in hparams= and read them with net.value(name) in the loss"
        )
    for name, value in given.items():
        known[name].check(f"hparams[{name!r}]", value)
        given[name] = float(value)
    places, plain, alone = places_of(model)
    if not places:
        raise ValueError(f"no layer of model can respond: {plain or 'it has no parameters'}")
    if perturb == "example" and not alone:
        unconverted = [p.name for p in places if term_of(p.users[0][0]) is None]
        raise ValueError(
            f"perturb='example' is not possible for {unconverted}: use 'batch' or 'auto'"
        )
    report = Report(tuple(p.name for p in places), plain, alone and perturb != "batch")
    return SelfTuned(model, given, known, places, report, scale, perturb == "example")


class SelfTuned(PerturbedModel):
    """A converted model; see :func:`convert`.

    While training, each pass draws perturbations δ and runs the model with its strengths at
    ``z + δ`` and its weights at ``w + J δ``. In evaluation mode it is the model itself.

    Attributes:
        report: The parameters with sensitivities.
        spread: log σ of the perturbations, shape (hyperparameters,).
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, float],
        known: Mapping[str, Hparam],
        places: list[Place],
        report: Report,
        scale: float,
        must: bool = False,
    ) -> None:
        like = next(model.parameters())
        raw = [
            float(h.bijection.inverse(torch.tensor(values[n] or h.from_zero, dtype=torch.float64)))
            for n, h in known.items()
        ]
        # Steps of the optimizer would be rounded away in half precision.
        wide = torch.promote_types(like.dtype, torch.float32)
        super().__init__(model, like.new_tensor(raw, dtype=wide), places, scale)
        self.spread = nn.Parameter(torch.full_like(self.raw, scale).log())
        self.report = report
        own_counters(model)
        strengths = tunables(model)
        self._known = dict(known)
        self._buffers_of = {n: strengths[n].buffers if n in strengths else [] for n in known}
        self._present: dict[str, Tensor] = {}
        self._tuning = self._compared = False
        self._read: set[str] = set()
        self._must = must
        self._hooks = hooks_of(self, places) if report.per_example else []

    # public methods

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model."""
        if not self.training and not self._tuning:
            self._present = self._values(self.raw.detach())
            return self.model(*args, **kwargs)
        delta, self._present = self.perturbation(args, kwargs)
        return self.at(delta, args, kwargs)

    def weights(self) -> Iterator[nn.Parameter]:
        """Parameters of the model and of the sensitivities, for the optimizer of the weights."""
        yield from self.model.parameters()
        yield from self.response_parameters()

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the sensitivities only."""
        yield from self.gains.values()
        yield from self.rows.values()

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Raw hyperparameters and their spread, for the optimizer of the hyperparameters."""
        return [self.raw, self.spread]

    def hparams(self) -> dict[str, float]:
        """The current hyperparameters by name."""
        return {n: float(v) for n, v in self._values(self.raw.detach()).items()}

    def value(self, name: str) -> Tensor:
        """The value of a hyperparameter in the last pass, perturbed while training, shape ().

        Raises:
            ValueError: The name is unknown, or its value differs between examples.
        """
        if name not in self._known:
            raise ValueError(f"name={name!r} is unknown: use one of {list(self._known)}")
        value = self._present.get(name, self._values(self.raw.detach())[name])
        if value.numel() > 1 and self._buffers_of[name]:
            raise ValueError(f"name={name!r} has one value per example: only its layer reads it")
        self._read.add(name)
        return value.flatten()[0]

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Passes on validation data: in evaluation mode, and differentiable in the hyperparameters.

        The modes of all modules are restored at the end.

        Raises:
            ValueError: A hyperparameter belongs to no layer and was not read by the loss.
        """
        idle = [n for n, b in self._buffers_of.items() if not b and n not in self._read]
        if idle:
            raise ValueError(
                f"hparams {idle} do not enter the loss: read them with net.value(name) there"
            )
        self._tuning = True
        try:
            with evaluating(self):
                yield
        finally:
            self._tuning = False

    def entropy(self) -> Tensor:
        """Entropy of the perturbations, ``Σ log σ`` up to a constant; subtract it from the loss."""
        return self.spread.sum()

    def revert(self) -> nn.Module:
        """The original model, with the current hyperparameters in its layers."""
        values = self._values(self.raw.detach())
        buffers = dict(self.model.named_buffers())
        for name, places in self._buffers_of.items():
            for place in places:
                buffers[place].copy_(values[name])
        self._remove_hooks()
        return self.model

    # a pass

    def perturbation(self, args: Any, kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """δ of this pass, and the perturbed hyperparameters.

        While training, δ is constant; while tuning, it is a function of hyperparameters and spread.
        Strengths have one value for each example if the model supports it, penalties one for each
        pass.
        """
        new = self.report.per_example and not self._compared
        if new and not torch.compiler.is_compiling():
            self._compare(args, kwargs)
        batch = self.batch_size(args, kwargs) if self.report.per_example else 1
        draw = torch.randn(batch, len(self.raw), dtype=self.raw.dtype, device=self.raw.device)
        if batch > 1:
            shared = [not places for places in self._buffers_of.values()]
            draw = torch.where(draw.new_tensor(shared).bool(), draw[:1], draw)
        move = self.spread.exp() * draw
        delta = self.raw - self.raw.detach() + move if self._tuning else move.detach()
        values = self._values(self.raw.detach() + delta.detach())
        delta = delta.to(next(self.model.parameters()).dtype)
        return (delta if self.report.per_example else delta[0]), values

    def _values(self, raw: Tensor) -> dict[str, Tensor]:
        columns = raw.unbind(-1)
        return {
            n: h.bijection.forward(c).clamp(h.lower, h.upper)
            for (n, h), c in zip(self._known.items(), columns, strict=True)
        }

    def strengths(self) -> dict[str, Tensor]:
        """The strength buffers of this pass by name, shape (1,) or (batch,)."""
        strengths: dict[str, Tensor] = {}
        for name, places in self._buffers_of.items():
            strengths |= dict.fromkeys(places, self._present[name].reshape(-1))
        return strengths

    def centred(self, args: Any, kwargs: Any) -> Any:
        """A training pass at the unperturbed hyperparameters and weights."""
        self._present = self._values(self.raw.detach())
        return functional_call(self.model, self.strengths(), args, kwargs)

    def _compare(self, args: Any, kwargs: Any) -> None:
        """Perturb the whole batch if the model has other outputs with perturbed examples."""
        reason = difference(self, args, kwargs)
        if reason == "":
            reason = self._reaches_others(args, kwargs)
        self._compared = reason is not None
        if not reason:
            return
        if self._must:
            raise ValueError(f"perturb='example' is not possible ({reason}): use 'batch' or 'auto'")
        log.warning("the model is perturbed once per batch, not per example: %s", reason)
        self.report = replace(self.report, per_example=False)
        self._remove_hooks()

    @torch.no_grad()
    def _reaches_others(self, args: Any, kwargs: Any) -> str:
        """Why the strength of an example has an effect on other ones; "" if it has none.

        Compares passes with the same random numbers, of which the last has other strengths for the
        first example; all but the layers with strengths are in evaluation mode.
        """
        raw = self.raw.detach().expand(self.batch_size(args, kwargs), -1).clone()
        outputs = []
        with evaluating(self):
            for layer in (m for m in self.model.modules() if isinstance(m, Tunable)):
                layer.train()
            for shift in (0.0, 0.0, 1.0):
                raw[0] += shift
                self._present = self._values(raw)
                with random_kept(raw.device), buffers_kept(self.model.modules()):
                    try:
                        out = functional_call(self.model, self.strengths(), args, kwargs)
                    except (RuntimeError, ValueError, IndexError) as error:
                        return first_line(error)
                leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.ndim]
                outputs.append([t[1:] for t in leaves if len(t) == len(raw)])
        first, again, moved = outputs

        def same(a: list[Tensor], b: list[Tensor]) -> bool:
            pairs = zip(a, b, strict=True)
            return all(torch.allclose(x, y, equal_nan=True) for x, y in pairs)

        if not same(first, again) or same(first, moved):  # nothing follows from other numbers
            return ""
        return "strengths of layers act on another dimension than that of the examples"

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
