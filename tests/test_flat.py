"""The flat layout. Truths: round trips, and torch's own per-tensor operations."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from selftune._flat import Layout, local

SHAPES: list[tuple[int, ...]] = [(2, 3), (1,), (4,), (1, 2, 2)]


def randoms(*dtypes: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    cycled = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
    return [
        torch.randn(size=s, generator=generator).to(d) for s, d in zip(shapes, cycled, strict=True)
    ]


DTYPES = [
    ((torch.float64,), torch.float64),
    ((torch.float32,), torch.float32),
    ((torch.float16,), torch.float32),
    ((torch.bfloat16,), torch.float32),
    ((torch.bfloat16, torch.float16), torch.float32),
    ((torch.bfloat16, torch.float32), torch.float32),
    ((torch.float32, torch.float64, torch.float32), torch.float64),
]


@pytest.mark.parametrize(("dtypes", "flat_dtype"), DTYPES)
def test_round_trip_keeps_every_bit(
    dtypes: tuple[torch.dtype, ...], flat_dtype: torch.dtype
) -> None:
    """Law: writing what was flattened changes nothing; the vector is never half-precision."""
    tensors = randoms(*dtypes)
    layout = Layout(tensors)
    flat = layout.flatten(tensors)
    assert flat.dtype == layout.dtype == flat_dtype
    assert flat.shape == (layout.numel,)
    back = [torch.full_like(t, 7) for t in tensors]
    layout.write(flat, back)
    for ours, theirs in zip(back, tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_flatten_is_a_copy_and_views_are_not() -> None:
    """Law: views share memory with the vector, the vector shares none with the tensors."""
    tensors = randoms(torch.float64)
    layout = Layout(tensors)
    flat = layout.flatten(tensors)
    before = [t.clone() for t in tensors]
    layout.views(flat)[2].fill_(5)
    assert (flat[7:11] == 5).all()
    assert (flat == 5).sum() == 4
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_a_single_tensor_is_copied_too() -> None:
    """Law: as above, where torch.cat has one tensor to join."""
    tensor = randoms(torch.float32, shapes=[(3,)])[0]
    Layout([tensor]).flatten([tensor]).zero_()
    assert tensor.all()


def test_views_keep_leading_dimensions() -> None:
    """Truth: slicing by hand."""
    tensors = randoms(torch.float64)
    layout = Layout(tensors)
    rows = torch.randn(3, layout.numel, dtype=torch.float64)
    views = layout.views(rows)
    assert [tuple(v.shape) for v in views] == [(3, *s) for s in SHAPES]
    assert torch.equal(views[0], rows[:, :6].reshape(3, 2, 3))
    assert torch.equal(views[3], rows[:, 11:].reshape(3, 1, 2, 2))


def test_write_into_parameters_that_require_gradients() -> None:
    """Truth: the vector's own slices; autograd does not object, identity is kept."""
    params = [torch.nn.Parameter(t) for t in randoms(torch.float32)]
    layout = Layout(params)
    pointers = [p.data_ptr() for p in params]
    flat = torch.arange(float(layout.numel))
    layout.write(flat, params)
    assert params[2].tolist() == [7, 8, 9, 10]
    assert [p.data_ptr() for p in params] == pointers


def test_expand_equals_a_loop_over_tensors() -> None:
    """Truth: torch.full_like and Tensor.sum for each tensor."""
    tensors = randoms(torch.float64)
    layout = Layout(tensors)
    values = [0.1, 0.2, 0.1, -3.0]
    expanded = layout.expand(values)
    assert isinstance(expanded, Tensor)
    want = layout.flatten([torch.full_like(t, v) for t, v in zip(tensors, values, strict=True)])
    assert torch.equal(expanded, want)


def test_expand_gives_a_number_where_all_agree() -> None:
    """Truth: the number itself, so that no vector is made."""
    assert Layout(randoms(torch.float32)).expand([0.3] * 4) == 0.3


def test_local_takes_the_shard() -> None:
    """Truth: a stand-in for DTensor, whose ``to_local`` is known."""

    class Sharded:
        def to_local(self) -> Tensor:
            return torch.ones(2)

    sharded: Tensor = Sharded()  # type: ignore[assignment]
    assert torch.equal(local(sharded), torch.ones(2))
    plain = torch.zeros(2)
    assert local(plain) is plain
