"""Dropout with a tuned rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selftune._arguments import MODULE, NAMES, NONE, Instance, ListOf, Whole, checked
from selftune._binding import functional_call
from selftune.nn._base import Stochastic, fraction

EDGE = 1e-6
"""Minimum distance of a rate from 0 and 1 in its log-odds."""


class Dropout(Stochastic):
    """Zeroes each entry with probability p and scales the rest by 1/(1 − p).

    ``y = x (1 + e)``, e = m/(1 − p) − 1 with m ∈ {0, 1}. The derivative in p is that of noise with
    standard deviation √(p/(1 − p)) at fixed random numbers: ``∂e/∂logit(p) = e/2``. It is accurate
    to second order in e, is never NaN, and allows every estimator to tune the rate.

    Args:
        p: The rate, 0 or 0.001…0.95; 0 becomes 0.05 if tuned.
        name: Name of the hyperparameter; layers with the same name share one rate.
        share: Dimensions along which the mask is constant, for example ``(1,)`` for all time steps
            of (batch, time, features).

    Raises:
        ValueError: The rate is outside its bounds.

    Examples:
        >>> import torch, selftune as st
        >>> layer = st.nn.Dropout(0.5, name="hidden")
        >>> sorted(set(layer(torch.ones(10_000)).tolist()))
        [0.0, 2.0]
        >>> layer.eval()(torch.ones(2))
        tensor([1., 1.])

    Source: Srivastava et al. 2014; shared draws: Gal & Ghahramani 2016.
    """

    argument: ClassVar[str] = "p"

    @checked(share=ListOf(Whole(), "dimensions"))
    def __init__(self, p: float = 0.5, name: str = "dropout", share: Sequence[int] = ()) -> None:
        super().__init__(p, fraction(name))
        self.share = tuple(share)

    def change(self, input: Tensor) -> Tensor:
        """Drop entries."""
        self.check_floating(input)
        shared = self._shared(input)
        shape = tuple(1 if i in shared else n for i, n in enumerate(input.shape))
        draw = self.uniform(shape).to(wide(input.dtype))
        return input * scaled_mask(draw, self.level(draw)).to(input.dtype)

    def _shared(self, input: Tensor) -> set[int]:
        """Dimensions of the input along which the mask is constant."""
        outside = [i for i in self.share if not -input.ndim <= i < input.ndim]
        if outside:
            raise ValueError(
                f"{type(self).__name__}(share={self.share}): an input of shape "
                f"{tuple(input.shape)} has no dimension {outside[0]}"
            )
        return {i % input.ndim for i in self.share}


class Dropout2d(Dropout):
    """Zeroes whole channels of (batch, channels, …).

    Args:
        p: The rate.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> maps = st.nn.Dropout2d(0.5)(torch.ones(4, 8, 3, 3))
        >>> bool((maps == maps[:, :, :1, :1]).all())
        True

    Source: Tompson et al. 2015.
    """

    def __init__(self, p: float = 0.5, name: str = "dropout") -> None:
        super().__init__(p, name)

    def _shared(self, input: Tensor) -> set[int]:
        return set(range(2, input.ndim))


class DropConnect(Dropout):
    """Wraps a module and drops some of its weights in each training pass, for all examples alike.

    Args:
        module: Any module, for example an ``nn.LSTM``.
        p: The rate.
        name: Name of the hyperparameter.
        weights: Names of the parameters with dropped entries; by default all weight matrices, or
            only the hidden-to-hidden ones of recurrent modules.

    Raises:
        ValueError: The module has no such parameter, or it is part of a parametrization.

    Examples:
        >>> import torch, selftune as st
        >>> lstm = st.nn.DropConnect(torch.nn.LSTM(4, 8), 0.5)
        >>> output, state = lstm(torch.randn(5, 2, 4))
        >>> lstm.weights
        ('weight_hh_l0',)

    Source: Wan et al. 2013; Merity et al. 2018, section 2.
    """

    @checked(module=MODULE, weights=NAMES | NONE)
    def __init__(
        self,
        module: nn.Module,
        p: float = 0.5,
        name: str = "dropconnect",
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(p, name)
        self.module = module
        known = {n: w for n, w in module.named_parameters() if w.ndim >= 2}
        within = "weight_hh" if isinstance(module, nn.RNNBase) else ""
        chosen = [n for n in known if n.startswith(within)] if weights is None else list(weights)
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"weights={weights} must be matrices: this module has {sorted(known)}")
        parts = [n for n in chosen if _is_part(module, n)]
        if parts:
            raise ValueError(
                f"weights={parts} are parts of which a parametrization computes one weight, as "
                "weight_norm does: name other matrices in weights=, or use st.nn.Dropout"
            )
        self.weights = tuple(chosen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with some weights dropped."""
        if not self.training:
            return self.module(*args, **kwargs)
        params = dict(self.module.named_parameters())
        p, dropped = self.strength.mean(), {}
        for stream, name in enumerate(self.weights):
            weight = params[name]
            draw = self.uniform(tuple(weight.shape), stream).to(wide(weight.dtype))
            dropped[name] = weight * scaled_mask(draw, p.to(draw.dtype)).to(weight.dtype)
        self.key.add_(1)
        return functional_call(self.module, dropped, args, kwargs)


class EmbeddingDropout(Dropout):
    """Wraps an embedding and drops whole words in each training pass.

    Args:
        embedding: The embedding.
        p: The rate.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> words = st.nn.EmbeddingDropout(torch.nn.Embedding(10, 4), 0.5)
        >>> words(torch.arange(10)).shape
        torch.Size([10, 4])

    Source: Gal & Ghahramani 2016.
    """

    @checked(embedding=Instance((nn.Embedding,), "a torch.nn.Embedding"))
    def __init__(self, embedding: nn.Embedding, p: float = 0.1, name: str = "embedding") -> None:
        super().__init__(p, name)
        self.embedding = embedding

    def forward(self, input: Tensor) -> Tensor:
        """The vectors of words, shape (…, features)."""
        vectors: Tensor = self.embedding(input)
        if not self.training:
            return vectors
        words = self.uniform((self.embedding.num_embeddings,)).to(wide(vectors.dtype))
        draw = words[input]
        kept = scaled_mask(draw, self.level(draw)).to(vectors.dtype)
        self.key.add_(1)
        return vectors * kept.unsqueeze(-1)


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one of several of which a weight is computed, as by weight_norm."""
    path, _, last = name.rpartition(".")
    old = last.endswith(("_g", "_v")) and hasattr(module.get_submodule(path), last[:-2])
    return old or re.search(r"parametrizations\..+\.original\d", name) is not None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of random numbers: in half precision, the nearest numbers to a rate would differ."""
    return torch.promote_types(dtype, torch.float32)


def scaled_mask(draw: Tensor, p: Tensor) -> Tensor:
    """``m/(1 − p)``, with the derivative in p of noise of the same standard deviation.

    Args:
        draw: Uniform numbers; entries below p are dropped.
        p: The rate, in a shape that broadcasts.
    """
    fixed = p.detach()
    mask = (draw >= fixed).to(draw.dtype) / (1 - fixed)
    odds = torch.logit(p.clamp(EDGE, 1 - EDGE))
    growth = (odds - odds.detach()) / 2  # 0, with a derivative
    return mask + (mask - 1) * growth
