"""State that a block restores: modes of modules and of torch, buffers and random states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Result = TypeVar("Result")


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the mode of every module after the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def attention_by_steps() -> Iterator[None]:
    """Turn off the fused kernel of torch's encoder layers: it calls no hooks and has no vmap."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Creates tensors that later steps may change in place, also under ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def random_kept(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random states of the CPU and of a GPU after the block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def every_random_kept() -> Iterator[None]:
    """Restores the random states of the CPU and of all GPUs in use after the block."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        yield


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draws the random numbers of a seed within the block, and restores the states after it."""
    with random_kept(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class KeptBuffer(NamedTuple):
    """A buffer before a forward pass: the tensor, which a pass may replace, and its values."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    values: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> KeptBuffer:
        """A buffer as it is now."""
        buffer = getattr(module, name)
        return cls(module, name, buffer, None if buffer is None else buffer.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the tensor back, with its values."""
        if getattr(self.module, self.name) is not self.buffer:
            setattr(self.module, self.name, self.buffer)
        if self.buffer is None or self.values is None:
            return
        if self.buffer.shape != self.values.shape:
            self.buffer.data = self.values
        elif not torch.equal(self.buffer, self.values):  # a copy would invalidate earlier graphs
            self.buffer.copy_(self.values)


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the modules' own buffers, whether they are changed in place or replaced."""
    kept = [KeptBuffer.of(m, n) for m in modules for n in m._buffers]  # None as well
    try:
        yield
    finally:
        for buffer in kept:
            buffer.restore()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within a block."""
    with modes_kept(model):
        model.eval()
        yield


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context without autocast, which would compute inner products in low precision."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def autocast_kept(closure: Callable[[], Result], device: str) -> Callable[[], Result]:
    """A closure that runs in the autocast of the caller of this function, wherever it is called."""
    if not _autocasts(device):
        return closure
    dtype, caches = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()

    def called() -> Result:
        with torch.autocast(device, dtype, cache_enabled=caches):
            return closure()

    return called


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def random_states() -> dict[str, Any]:
    """The random states of torch, Python and NumPy as tensors and numbers."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - users' data sets use it
    states = {
        "torch": torch.get_rng_state(),
        "python": (version, torch.from_numpy(np.array(numbers, dtype=np.int64)), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def draw_once() -> None:
    """Draw a number of each generator, so that what follows differs from what came before."""
    torch.rand((), device="cpu")
    random.random()
    np.random.random()  # noqa: NPY002 - users' data sets use it


def restore_random_states(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
