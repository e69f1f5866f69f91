"""Buffers that training passes change and validation passes do not, such as running codebooks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from selftune.tuner._data import Stream
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps


def carried(
    steps: Steps, run: RunState, streams: tuple[Stream, Stream], *, mapped: bool
) -> set[int]:
    """The positions of these buffers, from a pass on the first batch of each stream.

    Their values in the training pass fit the averaged weights as well. A hidden state, which
    validation passes change too, stays that of the validation batches.

    Args:
        steps: The steps.
        run: The initial run.
        streams: Training and validation batches.
        mapped: Whether members of a population are trained, by ``torch.func``.
    """
    apart = _statistics(steps.inner) | {n for names in steps.layers.values() for n in names}
    named = enumerate(zip(steps.buffers, run.buffers, strict=True))
    maybe = [i for i, (n, b) in named if b.is_floating_point() and n not in apart]
    if not maybe:
        return set()
    device = run.step.device
    changed: list[set[int]] = []
    for stream, passed in zip(streams, (steps.train_pass, steps.val_pass), strict=True):
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.set_grad_enabled(mapped or steps.whole is not None),
        ):
            after = passed(run, stream.peek())[2]
        changed.append({i for i in maybe if not torch.equal(after[i], run.buffers[i])})
    return changed[0] - changed[1]


def _statistics(module: nn.Module) -> set[str]:
    """Names of the running statistics, which validation passes collect for the average."""
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, _NormBase)]
    return {f"{n}.{name}" for n, m in norms for name, _ in m.named_buffers(recurse=False)}
