"""Settings that must agree between a run, its continuation and its other processes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLED = 1024
"""Number of values of a tensor in its digest."""


def flatten(name: str, value: Any) -> dict[str, Any]:
    """Settings by dotted names, as numbers and strings.

    Examples:
        >>> from selftune.method import Average
        >>> flatten("average", Average())
        {'average.rho': 0.98}
    """
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Mapping):
        pairs = [(str(k), v) for k, v in value.items()]
    else:
        return {name: value if isinstance(value, (bool, int, float, str)) else describe(value)}
    entries: dict[str, Any] = {}
    for key, part in pairs:
        entries |= flatten(f"{name}.{key}", part)
    return entries or {name: "none"}


def describe(value: Any) -> str:
    """The ``repr`` of an object without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def differences(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Names and values of settings that differ; for long values, the first line that differs.

    Examples:
        >>> differences({"amp": True, "every": 5}, {"amp": False, "every": 5})
        ['amp is True there and False here']
    """
    differing = []
    for name in dict.fromkeys([*mine, *saved]):
        there, here = (str(side.get(name, "none")) for side in (saved, mine))
        if there == here:
            continue
        lines = zip(f"{there}\n".splitlines(), f"{here}\n".splitlines(), strict=False)
        first = next(((a, b) for a, b in lines if a != b), (there, here))
        a, b = (line.strip() for line in first)
        differing.append(f"{name} is {a} there and {b} here")
    return differing


def digest(tensors: Iterable[Tensor], *, values: bool = True) -> int:
    """A checksum of shapes, dtypes and, optionally, about 1,024 values of each tensor."""
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
        if values:
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
            checksum = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), checksum)
    return checksum
