"""Augmentation of batches, on their device, with tuned strengths.

Inputs are images, (batch, channels, height, width). All augmentations are differentiable in
their strength and draw random numbers from a counter, independent of the loader's workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune._arguments import COUNT, MODULES, Number, Whole, checked
from selftune.bijections import Log
from selftune.hparams import Hparam
from selftune.nn._base import Stochastic, amount, fraction
from selftune.nn.dropout import wide


class Noise(Stochastic):
    """``x + s ξ``, ξ standard normal.

    Args:
        value: s, in units of the input, 0 or 0.001…10; 0 becomes 0.05 if tuned.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> round(float(st.nn.Noise(0.5)(torch.zeros(100_000)).std()), 1)
        0.5
    """

    def __init__(self, value: float = 0.05, name: str = "noise") -> None:
        super().__init__(value, amount(name))

    def change(self, input: Tensor) -> Tensor:
        """Add noise."""
        return input + self.level(input) * self.normal(tuple(input.shape)).to(input.dtype)


class _OneAnExample(Stochastic):
    """Draws one number in −1…1 for each example."""

    def drawn(self, input: Tensor, stream: int = 0) -> Tensor:
        """The random number times the strength, shaped to be multiplied with the batch."""
        draw = self.uniform((len(input), *[1] * (input.ndim - 1)), stream)
        return self.level(input) * (2 * draw - 1).to(input.dtype)


class Brightness(_OneAnExample):
    """``x + s u``, u uniform in −1…1 for each image.

    Args:
        value: s, in units of the input, 0 or 0.001…10; 0 becomes 0.05 if tuned.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> st.nn.Brightness(0.2)(torch.zeros(4, 1, 8, 8)).abs().max() <= 0.2
        tensor(True)
    """

    def __init__(self, value: float = 0.05, name: str = "brightness") -> None:
        super().__init__(value, amount(name))

    def change(self, input: Tensor) -> Tensor:
        """Shift all values."""
        return input + self.drawn(input)


class Contrast(_OneAnExample):
    """``m + (x − m)(1 + s u)``, m the mean and u uniform in −1…1 for each image.

    Args:
        value: s, 0 or 0.001…0.95; 0 becomes 0.05 if tuned.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> images = torch.randn(4, 1, 8, 8)
        >>> changed = st.nn.Contrast(0.5)(images)
        >>> torch.allclose(changed.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
        True
    """

    def __init__(self, value: float = 0.05, name: str = "contrast") -> None:
        super().__init__(value, fraction(name, 0.05))

    def change(self, input: Tensor) -> Tensor:
        """Stretch values about their mean."""
        self.check_floating(input)
        mean = input.mean(tuple(range(1, input.ndim)), keepdim=True)
        return mean + (input - mean) * (1 + self.drawn(input))


def _check_images(layer: Stochastic, input: Tensor, accepted: bool, shape: str) -> None:
    """Refuse inputs that are no images."""
    if not accepted:
        raise ValueError(
            f"{type(layer).__name__}(name={layer.hparam.name!r}) got an input of shape "
            f"{tuple(input.shape)}: pass images, {shape}, or leave this augmentation out"
        )


class Scale(_OneAnExample):
    """Images scaled by a factor 1 + s u, u uniform in −1…1.

    Args:
        value: s, 0 or 0.001…0.95; 0 becomes 0.02 if tuned.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> st.nn.Scale(0.2)(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, value: float = 0.02, name: str = "scale") -> None:
        super().__init__(value, fraction(name, 0.02))

    def change(self, input: Tensor) -> Tensor:
        """Resample about the centre."""
        self.check_floating(input)
        _check_images(self, input, input.ndim == 4, "(batch, channels, height, width)")
        factor = 1 / (1 + self.drawn(_fine(input)).flatten())
        still = torch.zeros_like(factor)
        return _resampled(input, factor, still, still)


class Translate(_OneAnExample):
    """Images shifted by up to a fraction s of their size in each direction.

    Args:
        value: s, 0 or 0.001…0.95; 0 becomes 0.02 if tuned.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> st.nn.Translate(0.2)(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, value: float = 0.02, name: str = "translate") -> None:
        super().__init__(value, fraction(name, 0.02))

    def change(self, input: Tensor) -> Tensor:
        """Resample at shifted coordinates."""
        self.check_floating(input)
        _check_images(self, input, input.ndim == 4, "(batch, channels, height, width)")
        across, down = (2 * self.drawn(_fine(input), stream).flatten() for stream in (0, 1))
        return _resampled(input, torch.ones_like(across), across, down)


def _resampled(images: Tensor, factor: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Bilinear resampling with zero padding; coordinates from −1 to 1, in single precision."""
    if not len(images):  # refused by affine_grid
        return images
    zero = torch.zeros_like(factor)
    rows = [torch.stack([factor, zero, across], 1), torch.stack([zero, factor, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    sampled = F.grid_sample(_fine(images), grid, align_corners=False)
    return sampled.to(images.dtype)


def _fine(images: Tensor) -> Tensor:
    """The images in single precision at least: coordinates of 8 bits are off by pixels."""
    return images.to(wide(images.dtype))


class Cutout(Stochastic):
    """Square holes of zeros: n on average, each with a side proportional to that of the image.

    The number of holes is random with mean n, because n is tuned as a real number.

    Args:
        value: n, 0 or 0.01…``most``; 0 becomes 0.1 if tuned.
        name: Name of the hyperparameter.
        size: Side of a hole, as a fraction of the image's side.
        most: Largest number of holes.

    Examples:
        >>> import torch, selftune as st
        >>> cut = st.nn.Cutout(1.0, size=0.5)(torch.ones(64, 1, 16, 16))
        >>> 0.7 < float(cut.mean()) < 0.9
        True

    Source: DeVries & Taylor 2017.
    """

    @checked(size=Number(above=0, most=1), most=COUNT)
    def __init__(
        self, value: float = 0.5, name: str = "cutout", size: float = 0.3, most: int = 4
    ) -> None:
        hparam = Hparam(name=name, bijection=Log(), lower=0.01, upper=float(most), from_zero=0.1)
        super().__init__(value, hparam)
        self.size, self.most = size, most

    def change(self, input: Tensor) -> Tensor:
        """Cut holes."""
        _check_images(self, input, input.ndim >= 3, "(batch, …, height, width)")
        batch, (height, width) = len(input), input.shape[-2:]
        across, down, drawn = (self.uniform((batch, self.most), stream) for stream in range(3))
        rank = torch.arange(self.most, device=input.device)
        chance = (self.strength.view(-1, 1) - rank).clamp(0, 1)
        there = (drawn < chance).to(chance.dtype) + chance - chance.detach()
        rows, columns = _near(down, height, self.size), _near(across, width, self.size)
        holes = (there.unsqueeze(-1) * rows).unsqueeze(-1) * columns.unsqueeze(-2)
        left = torch.ones_like(holes[:, 0])
        for hole in range(self.most):
            left = left * (1 - holes[:, hole])
        return input * left.view(batch, *[1] * (input.ndim - 3), height, width).to(input.dtype)


def _near(middle: Tensor, length: int, share: float) -> Tensor:
    """Mask of a hole along a side, shape (…, length), for its relative centre."""
    place = (torch.arange(length, device=middle.device) + 0.5) / length
    return ((place - middle.unsqueeze(-1)).abs() < share / 2).to(torch.float32)


class Mixup(Stochastic):
    """Each example mixed with another: ``(1 − λ) x + λ x'``, and its target likewise.

    λ is uniform in 0…s/2. It changes inputs and targets, so pass it to ``Tuner(augment=…)``, or
    call it on both. Classes of shape (batch, …) become probabilities, (batch, classes, …).

    Args:
        classes: Number of classes; 0 for numbers or probabilities, which are mixed directly.
        value: s, 0 or 0.001…0.95; 0 becomes 0.05 if tuned.
        name: Name of the hyperparameter.

    Examples:
        >>> import torch, selftune as st
        >>> mixup = st.nn.Mixup(classes=3, value=0.5)
        >>> inputs, target = mixup(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
        >>> target.sum(1)
        tensor([1., 1., 1., 1.])

    Source: Zhang et al. 2018.
    """

    @checked(classes=Whole(least=0))
    def __init__(self, classes: int, value: float = 0.2, name: str = "mixup") -> None:
        super().__init__(value, fraction(name, 0.05))
        self.classes = classes

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Mixed inputs and targets."""
        if not self.training:
            return input, target
        if not isinstance(target, Tensor):
            raise TypeError(
                f"Mixup(name={self.hparam.name!r}) got target={target!r}, which must be a tensor: "
                "pass batches with one target, or leave Mixup out"
            )
        if bool(self.classes) == target.is_floating_point():
            raise TypeError(
                f"Mixup(classes={self.classes}) got targets of {target.dtype}: pass the number of "
                "classes for class indices, and classes=0 for probabilities and other numbers"
            )
        if self.classes:
            target = F.one_hot(target.long(), self.classes).movedim(-1, 1).to(input.dtype)
        share = self.uniform((len(input),)).to(input.dtype) / 2
        self.key.add_(1)
        mixed = []
        for part in (input, target):
            shaped = share.view(-1, *[1] * (part.ndim - 1)) * self.level(part)
            mixed.append(torch.lerp(part, part.roll(1, 0), shaped.to(part.dtype)))
        return mixed[0], mixed[1]


class Augment(nn.Module):
    """Several augmentations of inputs and targets in sequence, while training.

    Args:
        parts: Modules on inputs, or on inputs and targets (:class:`Mixup`).

    Examples:
        >>> import torch, selftune as st
        >>> augment = st.nn.Augment(st.nn.Translate(0.1), st.nn.Mixup(classes=10))
        >>> inputs, target = augment(torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]))
        >>> inputs.shape, target.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 10]))
    """

    @checked(parts=MODULES)
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, input: Any, target: Any) -> tuple[Any, Any]:
        """Augmented inputs and targets; unchanged in evaluation mode."""
        if self.training:
            for part in self.parts:
                if isinstance(part, Mixup):
                    input, target = part(input, target)
                else:
                    input = part(input)
        return input, target
