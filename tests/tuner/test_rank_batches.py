"""A rank's part of batches. Truth: the parts of all ranks, put together."""

import numpy as np
import pytest
import torch
from torch import nn

from selftune.tuner._rank_batches import RankBatches  # private: every kind of batch


def test_batches_of_every_kind_are_divided() -> None:
    x, y = torch.arange(10.0).view(5, 2), np.arange(5)
    batch = {"x": x, "more": (y, ["a", "b", "c", "d", "e"], torch.tensor(3.0)), "name": "train"}
    one, two = (next(iter(RankBatches("train", rank, 2)([batch]))) for rank in (0, 1))
    assert torch.equal(torch.cat([one["x"], two["x"]]), x)
    assert np.array_equal(np.concatenate([one["more"][0], two["more"][0]]), y)
    assert one["more"][1] + two["more"][1] == ["a", "b", "c", "d", "e"]
    assert one["more"][2] == two["more"][2] == 3
    assert one["name"] == "train"
    texts = [next(iter(RankBatches("train", rank, 2)([["a", "b", "c"]]))) for rank in (0, 1)]
    assert texts == [["a"], ["b", "c"]]


def test_batches_that_cannot_be_divided_are_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    with pytest.raises(ValueError, match="shape \\(3, 4\\), which cannot be divided"):
        next(iter(RankBatches("val", 0, 2)([(torch.ones(4, 3), torch.ones(3, 4))])))
    with pytest.raises(ValueError, match="PackedSequence in a batch cannot be divided"):
        next(iter(RankBatches("val", 0, 2)([(packed, torch.ones(2))])))
    with pytest.raises(ValueError, match="object in a batch cannot be divided"):
        next(iter(RankBatches("val", 0, 2)([object()])))
