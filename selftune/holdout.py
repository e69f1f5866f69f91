"""Training without a validation set: a held-out share that later joins the training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from selftune._arguments import Number, Whole, check, checked

PART = Number(above=0, below=1)


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Holds out a share of the training set for validation until it joins the training data.

    Up to the share ``until`` of a run's steps, the held-out examples are the validation set, and
    hyperparameters are tuned. Then they become training data, the hyperparameters keep their
    values, and the rest of the run, with its annealed learning rate, trains on all examples.

    After the join there is no validation set, so the test loss must be estimated on other data. If
    the validation loss worsened before the join, the run has overfitted, and its final weights are
    the last good ones from before the join.

    Args:
        share: Share of the examples that is held out, in (0, 1).
        until: Share of the steps after which they join, in (0, 1).

    Raises:
        TypeError: An argument is not a number.
        ValueError: It is not in (0, 1).

    Examples:
        >>> import torch, selftune as st
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(100), batch_size=10, shuffle=True)
        >>> data = st.HoldOut().over(loader, steps=30)
        >>> data.join, len(data.held)
        (18, 10)

    Source: this library; measured by ``benchmarks/quality/no_validation.py``.
    """

    share: float = 0.1
    until: float = 0.6

    def __post_init__(self) -> None:
        check({"share": PART, "until": PART}, vars(self))

    def join(self, steps: int) -> int:
        """The step after which the held-out examples join the training data.

        Examples:
            >>> HoldOut().join(1000)
            600
        """
        return min(max(1, round(self.until * steps)), steps - 1)

    def over(self, loader: DataLoader[Any], steps: int, *, seed: int = 0) -> HeldOut:
        """Return the batches of a run for your own loop.

        Args:
            loader: A DataLoader over a dataset with a length. Its dataset, batch size,
                ``drop_last``, ``collate_fn`` and workers are used, and its examples are shuffled if
                it shuffles.
            steps: Training batches of the whole run.
            seed: Determines the held-out examples and the order of all batches.

        Raises:
            ValueError: ``loader`` is not such a DataLoader, has a custom sampler, or there are too
                few examples or steps.
        """
        return HeldOut(loader, steps, settings=self, seed=seed)


class HeldOut:
    """Training batches of a run, and validation batches until the held-out examples join.

    Iterating yields ``steps`` training batches in epochs: without the held-out examples up to and
    including step ``join``, then in a new epoch over all examples. Each batch depends only on the
    seed and its index, not on the workers, so two numbers determine the position in a run.

    Attributes:
        steps: Training batches in the run.
        join: Number of training batches without the held-out examples.
        held: Indices of the held-out examples, in increasing order.
        step: Training batches yielded so far.
        val: Endless validation batches of up to twice the batch size, from the held-out examples.

    Examples:
        >>> import torch, selftune as st
        >>> from torch.nn.functional import mse_loss
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x = torch.randn(64, 4)
        >>> loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16, shuffle=True)
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.AdamW(net, lr=1e-3, total_steps=50)
        >>> data = st.HoldOut().over(loader, steps=50)
        >>> def val_loss():
        ...     inputs, targets = next(data.val)
        ...     return mse_loss(net(inputs), targets)
        >>> for inputs, targets in data:
        ...     opt.zero_grad()
        ...     mse_loss(net(inputs), targets).backward()
        ...     opt.step()
        ...     if data.holding:
        ...         loss = opt.hyper_step(val_loss)
        >>> data.step, data.holding
        (50, False)
    """

    @checked(steps=Whole(least=2), seed=Whole())
    def __init__(
        self, loader: DataLoader[Any], steps: int, *, settings: HoldOut, seed: int = 0
    ) -> None:
        given = f"share={settings.share}"
        parts = divide(loader, settings.share, seed, given, "loader", "hold out examples yourself")
        rest, self.held = map(sorted, parts)
        self.steps, self.join, self.step, self._seed = steps, settings.join(steps), 0, seed
        size, shuffled = loader.batch_size or 1, isinstance(loader.sampler, RandomSampler)
        everything = range(len(rest) + len(self.held))
        # Loaders draw a seed for every iterator: not from the global generator, where a resumed
        # run, which makes others, would shift later draws.
        self._generator = generator = torch.Generator()
        kept: list[_Batches] = [
            _Batches(indices, size, shuffled, _drops(loader, len(indices)), 3 * seed + i, end)
            for i, (indices, end) in enumerate(((rest, self.join), (everything, steps - self.join)))
        ]
        for batches in kept:
            if not len(batches):
                raise ValueError(
                    f"loader: drop_last=True drops all of its {len(batches.indices)} training "
                    f"examples in batches of {size}: pass a smaller batch_size, or drop_last=False"
                )
        self._train = [
            (b, like(loader, loader.dataset, batch_sampler=b, generator=generator)) for b in kept
        ]
        few = min(2 * size, len(self.held))
        own = _Batches(self.held, few, True, True, 3 * seed + 2, None)
        reader = DataLoader(
            loader.dataset, batch_sampler=own, collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory, generator=generator,
        )  # fmt: skip
        self.val = _Validation(own, reader)

    @property
    def holding(self) -> bool:
        """Whether the last batch is from before the join, so that ``hyper_step`` should be called.

        It is False as soon as the held-out examples are training data.
        """
        return self.step <= self.join

    def __len__(self) -> int:
        """Training batches in the run."""
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        """Training batches from ``step`` on."""
        while self.step < self.steps:
            joined = self.step >= self.join
            batches, loader = self._train[joined]
            if joined:  # stops the first loader's persistent workers
                vars(self._train[0][1])["_iterator"] = None
            batches.taken = self.step - joined * self.join
            self._generator.manual_seed((self._seed * 2**24 + self.step) % 2**63)
            for batch in loader:
                self.step += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The numbers of training and validation batches so far."""
        return {"step": self.step, "val": self.val.taken, "steps": self.steps, "join": self.join,
                "seed": self._seed, "held": len(self.held)}  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from ``state_dict``; start a new iteration afterwards.

        Random transforms draw from torch's global generators: restore these too.

        Raises:
            ValueError: The state is from a run with a different length, seed or split.
        """
        mine = self.state_dict()
        for name in ("steps", "join", "seed", "held"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"state: {name} is {state[name]} there and {mine[name]} here: pass the "
                    "same dataset, steps, seed, share and until"
                )
        self.step, self.val.taken = state["step"], state["val"]


class _Batches:
    """Example indices of the remaining batches of an epoch.

    Args:
        end: Total number of batches; None if endless.
    """

    def __init__(
        self,
        indices: Sequence[int],
        size: int,
        shuffled: bool,
        drop_last: bool,
        seed: int,
        end: int | None,
    ) -> None:
        self.indices, self.taken, self._end = indices, 0, end
        self._size, self._shuffled, self._drop, self._seed = size, shuffled, drop_last, seed

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, more = divmod(len(self.indices), self._size)
        return whole + bool(more and not self._drop)

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the current epoch."""
        epoch, first = divmod(self.taken, len(self))
        left = len(self) if self._end is None else self._end - self.taken + first
        order = torch.arange(len(self.indices), device="cpu")
        if self._shuffled:
            generator = torch.Generator().manual_seed((self._seed * 2**24 + epoch) % 2**63)
            order = torch.randperm(len(self.indices), generator=generator, device="cpu")
        for batch in order.split(self._size)[first : min(left, len(self))]:
            yield [self.indices[i] for i in batch.tolist()]


class _Validation:
    """Endless validation batches, with the number of batches taken."""

    def __init__(self, batches: _Batches, loader: DataLoader[Any]) -> None:
        self.taken, self._batches, self._loader = 0, batches, loader
        self._open: Iterator[Any] | None = None
        self._at = 0  # ``taken`` at the position of the open iterator

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch, from the next epoch if this one has ended."""
        if self._open is None or self._at != self.taken or self.taken % len(self._batches) == 0:
            self._batches.taken = self.taken
            self._open = iter(self._loader)
        batch = next(self._open)
        self.taken += 1
        self._at = self.taken
        return batch


def divide(
    loader: Any, share: float, seed: int, given: str, name: str, instead: str
) -> tuple[list[int], list[int]]:
    """Split a loader's dataset at random; return training and held-out indices.

    Args:
        loader: The loader.
        share: Share of the examples to hold out.
        seed: Seed of the split.
        given: The argument that requests the split, for error messages.
        name: Name of the loader, for error messages.
        instead: The remedy, for error messages.

    Raises:
        ValueError: The loader is not a DataLoader over a dataset with a length or has a custom
            sampler, or a part would be empty.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        raise ValueError(
            f"{given} can only split a DataLoader with a batch_size, not {name} "
            f"({type(loader).__name__}): pass such a DataLoader, or {instead}"
        )
    if type(loader).__iter__ is not DataLoader.__iter__ and not hasattr(loader, "state_dict"):
        raise ValueError(
            f"{given} cannot keep the __iter__ of {name}={type(loader).__name__}, which may change "
            f"the batches: change them in collate_fn or the dataset, or {instead}"
        )
    try:
        total = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        kind = type(loader.dataset).__name__
        raise ValueError(
            f"{given} needs a dataset with a length: {instead}; {name}.dataset is a {kind}"
        ) from None
    sampler: Any = loader.sampler
    whole = type(sampler) in (RandomSampler, SequentialSampler) and len(sampler) == total
    if not whole or getattr(sampler, "replacement", False):
        raise ValueError(
            f"{given} cannot keep the order of sampler={type(loader.sampler).__name__}: {instead}"
        )
    held_out = round(share * total)
    if not 0 < held_out < total:
        raise ValueError(
            f"{given} of {total} examples leaves {held_out} for validation, {total - held_out} for "
            f"training: pass another share, or {instead}"
        )
    order = torch.randperm(
        total, generator=torch.Generator().manual_seed(seed), device="cpu"
    ).tolist()
    return order[: total - held_out], order[total - held_out :]


def like(loader: DataLoader[Any], data: Any, **changes: Any) -> DataLoader[Any]:
    """A DataLoader with the options of another one, over other data."""
    options: dict[str, Any] = {"num_workers": loader.num_workers}
    if "batch_sampler" not in changes:
        options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        own = getattr(loader.sampler, "generator", None)
        options["generator"] = own if loader.generator is None else loader.generator
    options |= dict(
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn, persistent_workers=loader.persistent_workers,
        prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
    )  # fmt: skip
    return DataLoader(data, **(options | changes))


def split(
    loader: Any, share: float, seed: int, given: str
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Split a loader into one over the training part and one over the held-out part.

    Raises:
        ValueError: See :func:`divide`.
    """
    parts = divide(loader, share, seed, given, "train", "pass validation batches, fit(train, val)")
    rest, held_out = (Subset(loader.dataset, indices) for indices in parts)
    shuffled = isinstance(loader.sampler, RandomSampler)
    train = like(loader, rest, shuffle=shuffled, drop_last=_drops(loader, len(rest)))
    return train, like(loader, held_out, shuffle=True, drop_last=False)


def _drops(loader: Any, count: int) -> bool:
    """Whether the last batch is dropped: as by the loader, or if a split left it one example."""
    size, whole = loader.batch_size, len(loader.dataset)
    return bool(loader.drop_last) or count % size == 1 != whole % size  # for BatchNorm
