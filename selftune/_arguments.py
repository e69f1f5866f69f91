"""Valid values of arguments: one declaration for each, and one check for all.

@checked(every=Whole(least=1) | NONE, amp=FLAG)
def train(every, amp): ...
train(every=0, amp=True)   # ValueError: every=0 must be …
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor, nn


class Kind(ABC):
    """A kind of valid values."""

    @abstractmethod
    def fits(self, value: Any) -> bool:
        """Whether a value is of this type."""

    def holds(self, value: Any) -> bool:
        """Whether a value of this type is in the range."""
        return True

    def remedy(self, value: Any) -> str:
        """What would be valid instead of a value of another type, to end a message with."""
        return ""

    @abstractmethod
    def __str__(self) -> str:
        """The valid values in words, to follow "must be"."""

    def __or__(self, other: Kind) -> Kind:
        """A kind that accepts the values of both."""
        return Either(self, other)


@dataclass(frozen=True)
class Number(Kind):
    """A number in a range, not NaN, and finite unless infinity is allowed."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    finite: bool = True

    def fits(self, value: Any) -> bool:
        """Whether it is a number; True and False are not."""
        return isinstance(value, numbers.Real) and not isinstance(value, bool)

    def holds(self, value: Any) -> bool:
        """Whether it is finite and in the range."""
        if math.isnan(value) or (self.finite and math.isinf(value)):
            return False
        above = self.above == -math.inf or value > self.above
        below = self.below == math.inf or value < self.below
        return self.least <= value <= self.most and above and below

    def _range(self) -> str:
        ends = (
            ("at least", self.least), ("above", self.above), ("at most", self.most),
            ("below", self.below),
        )  # fmt: skip
        return " and ".join(f"{word} {end:g}" for word, end in ends if math.isfinite(end))

    def __str__(self) -> str:
        kind = "a finite number" if self.finite else "a number"
        return f"{self._range()}, {kind}" if self._range() else kind


@dataclass(frozen=True)
class Whole(Number):
    """A whole number in a range."""

    def fits(self, value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)

    def __str__(self) -> str:
        return f"{self._range()}, a whole number" if self._range() else "a whole number"


@dataclass(frozen=True)
class OneOf(Kind):
    """One of the given values."""

    values: tuple[Any, ...]

    def fits(self, value: Any) -> bool:
        """Whether it has the type of one of the values."""
        return isinstance(value, tuple({type(v) for v in self.values}))

    def holds(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        *others, last = map(repr, self.values)
        return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Instance(Kind):
    """An instance of given classes."""

    classes: tuple[type, ...]
    words: str

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.classes)

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Folder(Instance):
    """Paths of folders, which may be missing."""

    classes: tuple[type, ...] = (str, Path)
    words: str = "a folder, not a file"

    def holds(self, value: Any) -> bool:
        """Whether it is no file."""
        return not Path(value).is_file()


@dataclass(frozen=True)
class That(Kind):
    """Values accepted by a function."""

    test: Callable[[Any], bool]
    words: str

    def fits(self, value: Any) -> bool:
        return self.test(value)

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class ListOf(Kind):
    """A collection of values of one kind: a list, a tuple, a set or alike, but no string."""

    kind: Kind
    words: str

    def fits(self, value: Any) -> bool:
        """Whether it is a collection of such values."""
        fits = isinstance(value, (Collection, nn.Sequential, nn.ModuleList))
        return fits and not isinstance(value, (str, Mapping, Tensor)) and all(
            map(self.kind.fits, value)
        )  # fmt: skip

    def holds(self, value: Any) -> bool:
        return all(map(self.kind.holds, value))

    def remedy(self, value: Any) -> str:
        """A single value in a list."""
        return f": [{value!r}]" if self.kind.fits(value) else ""

    def __str__(self) -> str:
        return f"a list of {self.words}"


class Either(Kind):
    """Values of one of several kinds."""

    def __init__(self, *kinds: Kind) -> None:
        flat = [k for kind in kinds for k in getattr(kind, "kinds", (kind,))]
        self.kinds = sorted(flat, key=lambda kind: kind == NONE)  # None last in messages

    def fits(self, value: Any) -> bool:
        """Whether it is of one of the types."""
        return any(k.fits(value) for k in self.kinds)

    def remedy(self, value: Any) -> str:
        """That of one of the kinds."""
        return next(filter(None, (k.remedy(value) for k in self.kinds)), "")

    def holds(self, value: Any) -> bool:
        """Whether it is in the range of its type."""
        return any(k.fits(value) and k.holds(value) for k in self.kinds)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.kinds))


FLAG = Instance((bool, np.bool_), "True or False")
NONE = Instance((type(None),), "None")
TEXT = Instance((str,), "a string")
COUNT = Whole(least=1)
SHARE = Number(least=0, most=1)
MODULE = Instance((nn.Module,), "a torch.nn.Module")
MODULES = ListOf(MODULE, "torch.nn.Modules")
NAMES = ListOf(TEXT, "names")
PATH = Instance((str, Path), "a path")
FOLDER = Folder()
MAPPING = Instance((Mapping,), "a dictionary")
FUNCTION = That(callable, "a function")
REPEATABLE = That(  # classes of Python's with __next__ may begin anew in __iter__
    lambda v: not (isinstance(v, Iterator) and type(v).__module__ in ("builtins", "itertools")),
    "batches that every trial can iterate over, such as a DataLoader or a list",
)
SCALAR = That(
    lambda v: Number().fits(v) or (isinstance(v, Tensor) and v.numel() == 1),
    "a number, or a tensor with one element",
)
PAIR = That(
    lambda p: isinstance(p, (tuple, list)) and len(p) == 2 and all(map(Number().fits, p)),
    "two numbers",
)


def check(kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> None:
    """Raise an error for values that are not of their kind.

    Args:
        kinds: The kind of each argument, by name.
        values: Values by name; names without a kind are ignored.

    Raises:
        TypeError: A value has another type.
        ValueError: A value is outside its range.

    Examples:
        >>> check({"every": Whole(least=1) | NONE}, {"every": 0})
        Traceback (most recent call last):
        ValueError: every=0 must be at least 1, a whole number, or None
    """
    for name, kind in kinds.items():
        if name not in values:
            continue
        value = values[name]
        if not kind.fits(value):
            raise TypeError(f"{name}={_short(value)} must be {kind}{kind.remedy(value)}")
        if not kind.holds(value):
            raise ValueError(f"{name}={_short(value)} must be {kind}")


Function = TypeVar("Function", bound=Callable[..., Any])


def checked(**kinds: Kind) -> Callable[[Function], Function]:
    """Decorate a function, or an ``__init__``, to :func:`check` the arguments it is given.

    Examples:
        >>> @checked(size=Whole(least=1))
        ... def loader(size=32): ...
        >>> loader(2.5)
        Traceback (most recent call last):
        TypeError: size=2.5 must be at least 1, a whole number
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # the call itself names the function
                given = {}
            check(kinds, given)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _short(value: Any) -> str:
    """Its ``repr`` on one line, truncated if long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"


class Settings:
    """A frozen dataclass of numbers, which must not be NaN or negative.

    Attributes:
        signed: Names of numbers that may be negative.
        positive: Names of counts of at least 1.
    """

    signed: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the numbers against the types of their defaults."""
        for each in fields(self):  # type: ignore[arg-type]
            least = -math.inf if each.name in self.signed else float(each.name in self.positive)
            kinds: dict[type, Kind] = {
                bool: FLAG, int: Whole(least=least), float: Number(least=least, finite=False)
            }  # fmt: skip
            if type(each.default) in kinds:
                kind = kinds[type(each.default)]
                check({each.name: kind}, {each.name: getattr(self, each.name)})
