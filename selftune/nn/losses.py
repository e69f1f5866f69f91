"""Losses and activation penalties with a tuned strength."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune._arguments import Whole, checked
from selftune.bijections import Log, Logit
from selftune.hparams import Hparam
from selftune.nn._base import Tunable, backward_runs
from selftune.nn.dropout import wide


class LabelSmoothing(Tunable):
    """Cross-entropy, with label smoothing only while training.

    ``L = (1 − ε) CE + ε mean_c(−log p_c)``, averaged over examples.

    Args:
        value: ε, 0 or 0.001…0.9; 0 becomes 0.02 if tuned.
        name: Name of the hyperparameter.
        ignore_index: A target that is ignored.

    Raises:
        ValueError: The strength is outside its bounds.

    Examples:
        >>> import torch, selftune as st
        >>> loss_fn = st.nn.LabelSmoothing(0.1)
        >>> output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        >>> plain = torch.nn.functional.cross_entropy(output, target, label_smoothing=0.1)
        >>> bool(torch.isclose(loss_fn(output, target), plain))
        True

    Source: Szegedy et al. 2016, section 7.
    """

    @checked(ignore_index=Whole())
    def __init__(
        self, value: float = 0.1, name: str = "label_smoothing", ignore_index: int = -100
    ) -> None:
        hparam = Hparam(name=name, bijection=Logit(), lower=1e-3, upper=0.9, from_zero=0.02)
        super().__init__(value, hparam)
        self.ignore_index = ignore_index

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss.

        Args:
            output: Logits, shape (batch, classes, …).
            target: Classes, shape (batch, …), or probabilities in the shape of the logits.
        """
        index = self.ignore_index
        if not self.training:
            return F.cross_entropy(output, target, ignore_index=index)
        plain = F.cross_entropy(output, target, ignore_index=index, reduction="none")
        even = -F.log_softmax(output, dim=1).mean(1)
        level = self.level(plain)
        even = torch.where(level > 0, even, 0.0)  # infinite if a class is excluded by −inf
        smoothed = (1 - level) * plain + level * even
        if target.is_floating_point():
            return smoothed.mean()
        counted = target != index  # the loss elsewhere may be NaN, of logits that are −inf
        total = torch.where(counted, smoothed, 0.0).sum(dtype=wide(smoothed.dtype))
        return (total / counted.sum()).to(smoothed.dtype)


class _Penalty(Tunable):
    """Returns its input, and stores a penalty on it for ``extra_loss``.

    Attributes:
        extra: The penalty of the last use, or the sum over all uses since ``begin_pass``.
        adding: Whether uses are added up: between ``begin_pass`` and ``extra_loss``.
        tracked: Whether the last pass recorded a graph.
    """

    def __init__(self, value: float, name: str) -> None:
        hparam = Hparam(name=name, bijection=Log(), lower=1e-6, upper=1e2, from_zero=1e-2)
        super().__init__(value, hparam)
        self.extra: Tensor | None = None
        self.adding = False
        self.tracked = True

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not in the middle of a pass, whose graph could not be copied."""
        return {**self.__dict__, "extra": None, "adding": False}

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        if not self.training:
            return input
        exact = input.to(wide(input.dtype))  # squares in half precision overflow, or are 0
        squares = self.measure(exact)
        measured = self.level(squares) * squares
        # A sequence of length 1 has no changes, whose mean would be NaN.
        term = measured.mean() if measured.numel() else measured.sum()
        if backward_runs():  # an activation checkpoint, whose first pass has counted
            if not self.tracked:
                raise RuntimeError(
                    f"{type(self).__name__}(name={self.hparam.name!r}) has no gradient in a "
                    "reentrant activation checkpoint: pass use_reentrant=False, or leave it "
                    "outside the checkpoint"
                )
            return input
        self.tracked = torch.is_grad_enabled()
        self.extra = self.extra + term if self.adding and self.extra is not None else term
        return input

    def measure(self, input: Tensor) -> Tensor:
        """The penalty of each entry, a real number."""
        raise NotImplementedError


class ActivationPenalty(_Penalty):
    """Adds ``λ mean(x²)`` of its input to the training loss.

    The tuner adds it automatically; in your own loop the loss is
    ``criterion(model(x), y) + st.nn.extra_loss(model)``.

    Args:
        value: λ, 0 or 1e-6…100; 0 becomes 0.01 if tuned.
        name: Name of the hyperparameter.

    Raises:
        ValueError: The strength is outside its bounds.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Sequential(torch.nn.Identity(), st.nn.ActivationPenalty(0.5))
        >>> output = net(torch.full((2, 3), 2.0))
        >>> st.nn.extra_loss(net)
        tensor(2.)

    Source: Merity et al. 2017, "Revisiting activation regularization", equation 1 (AR).
    """

    def __init__(self, value: float = 1e-2, name: str = "ar") -> None:
        super().__init__(value, name)

    def measure(self, input: Tensor) -> Tensor:
        """Squares."""
        return _square(input)


class TemporalPenalty(_Penalty):
    """Adds ``λ mean((x_{t+1} − x_t)²)`` of a sequence to the training loss.

    Args:
        value: λ, 0 or 1e-6…100; 0 becomes 0.01 if tuned.
        name: Name of the hyperparameter.
        dim: The time dimension.

    Raises:
        ValueError: The strength is outside its bounds.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Sequential(st.nn.TemporalPenalty(1.0))
        >>> output = net(torch.arange(4.0).view(1, 4, 1))
        >>> st.nn.extra_loss(net)
        tensor(1.)

    Source: Merity et al. 2017, "Revisiting activation regularization", equation 2 (TAR).
    """

    @checked(dim=Whole())
    def __init__(self, value: float = 1e-2, name: str = "tar", dim: int = 1) -> None:
        super().__init__(value, name)
        self.dim = dim

    def measure(self, input: Tensor) -> Tensor:
        """Squared differences."""
        return _square(input.diff(dim=self.dim))


def _square(input: Tensor) -> Tensor:
    """``|x|²``, also of complex numbers."""
    return torch.view_as_real(input).square().sum(-1) if input.is_complex() else input.square()


def begin_pass(model: nn.Module) -> None:
    """Add up the penalties of all uses of a layer until ``extra_loss``.

    Without it, as after a forward pass whose penalties nobody takes, only the last use counts.

    Examples:
        >>> import torch, selftune as st
        >>> layer = st.nn.ActivationPenalty(1.0)
        >>> st.nn.begin_pass(layer)
        >>> for value in (1.0, 3.0):
        ...     _ = layer(torch.full((4,), value))
        >>> float(st.nn.extra_loss(layer))
        10.0
    """
    for module in model.modules():
        if isinstance(module, _Penalty):
            module.extra, module.adding = None, True


def extra_loss(model: nn.Module) -> Tensor | float:
    """The activation penalties of the last pass; a second call returns 0.

    Of a layer that is used more than once in a pass, the last use counts, or all uses since
    :func:`begin_pass`.
    """
    if not isinstance(model, nn.Module):  # not by `checked`: this is compiled with the pass
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    total: Tensor | float = 0.0
    for module in model.modules():
        if isinstance(module, _Penalty) and module.extra is not None:
            total = total + module.extra
            module.extra, module.adding = None, False
    return total
