"""Buffers of the training that validation passes use, such as running codebooks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from selftune._modes import random_kept
from selftune.tuner._data import Stream
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps


def carried(steps: Steps, run: RunState, stream: Stream, *, mapped: bool) -> set[int]:
    """The positions of the buffers that a pass on the first validation batch leaves unchanged.

    Their values in training, such as a running codebook's, fit the averaged weights as well. A
    hidden state, which validation passes change too, stays that of the validation batches.

    Args:
        steps: The steps.
        run: The initial run.
        stream: Validation batches.
        mapped: Whether members of a population are trained, by ``torch.func``.
    """
    apart = _statistics(steps.inner) | {n for names in steps.layers.values() for n in names}
    named = enumerate(zip(steps.buffers, run.buffers, strict=True))
    maybe = {i for i, (n, b) in named if b.is_floating_point() and n not in apart}
    if not maybe:
        return set()
    grads = torch.set_grad_enabled(mapped or steps.whole is not None)
    with random_kept(run.step.device), grads:
        after = steps.val_pass(run, stream.peek())[2]
    return {i for i in maybe if torch.equal(after[i], run.buffers[i])}


def _statistics(module: nn.Module) -> set[str]:
    """Names of the running statistics, which validation passes collect for the average."""
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, _NormBase)]
    return {f"{n}.{name}" for n, m in norms for name, _ in m.named_buffers(recurse=False)}
