"""Compiled steps against the same steps taken eagerly, and what happens where torch refuses."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parts import Batch, assert_same, batches, made, net
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._pytree import tree_map

import selftune as st
from selftune.tuner._compiled import Fused
from selftune.tuner._graph import signature


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unsqueeze(1))[0][:, -1])


class Scaled(nn.Module):
    """A model with a number that its user turns while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(4, 2), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Classy(Scaled):
    """The same number, of the class until it is set."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        del self.scale


class Cached(Scaled):
    """A tensor that is made again for batches of another size."""

    rows = torch.ones(0)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.rows) != len(x):
            self.rows = torch.full((len(x), 1), 0.5, dtype=x.dtype)
        return self.net(x) * self.rows


def normed() -> nn.Module:
    return net(norm=True)


class Offset(nn.Module):
    """Has a scalar parameter, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.offset = normed(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.offset


def fused(
    model: nn.Module, population: int | None = None, device: str = "cpu", *, joined: bool = True
) -> Fused:
    steps, run = made(
        model.double(), st.rules.AdamW(), tune=("lr", "beta1", "weight_decay"), every=2,
        guarded=True, horizon=100, device=device, joined=joined and population is None,
    )  # fmt: skip
    if population:
        run = tree_map(lambda t: torch.stack([t] * population), run)
    return Fused(steps, tree_map(torch.clone, run), population)


def twins(
    make: Any, population: int | None = None, device: str = "cpu", *, compiled: bool = True,
    joined: bool = True,
) -> tuple[Fused, Fused]:  # fmt: skip
    """One that is eager and one that is compiled, which start alike."""
    eager, other = (fused(make(), population, device, joined=joined) for _ in range(2))
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (other.run, eager.run)), strict=True):
        a.copy_(b)
    if compiled:
        other.compile()
    return eager, other


def follow(fused: Fused, data: list[Batch]) -> list[Tensor]:
    """The log of training steps, with a hyperparameter step after every second one."""
    told = []
    for step, batch in enumerate(data, start=1):
        last = step % 2 == 0
        told.append(fused.train(batch, tracked=last, last=last).clone())
        if last:
            told.append(fused.tune(batch).clone())
    return told


def assert_same_runs(one: Fused, other: Fused, data: list[Batch]) -> None:
    assert_same(follow(one, data), follow(other, data), rtol=1e-8, atol=1e-10)
    assert_same(one.run, other.run, rtol=1e-7, atol=1e-9)


def graphs() -> int:
    """How many torch has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def loops(source: str, count: int) -> Iterator[str]:
    """The loops of a C++ source over a number of weights."""
    for start in re.finditer(rf"for\s*\([^{{]*\b{count}L[^{{]*\{{", source):
        depth, end = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        yield source[start.start() : end]


@pytest.mark.slow
def test_compiled_steps_agree_with_eager_ones_to_rounding() -> None:
    """Twin; a shorter last batch is taken eagerly, by the same function, without a new graph.

    Law: bias corrections and hyperparameters are computed once, not once for every few weights.
    """
    eager, compiled = twins(Offset)  # torch 2.13 loses what is written to a scalar of its own
    with fresh_cache():
        _, sources = run_and_get_code(assert_same_runs, eager, compiled, batches(10))
    before = graphs()
    assert_same_runs(eager, compiled, batches(4, size=5))
    assert (graphs(), compiled.compiled) == (before, True)
    over_weights = [x for s in sources for x in loops(s, compiled.run.weights[0].numel())]
    assert over_weights
    assert not [x for x in over_weights if re.search(r"std::(pow|exp|expm1)\(", x)]


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_steps_on_separate_tensors_agree_with_eager_ones() -> None:
    """Twin; a population's, which are tensors too, are compiled to C++."""
    assert_same_runs(*twins(normed, joined=False), batches(10))


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_a_model_torch_cannot_compile_stays_eager_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Twin."""
    eager, compiled = twins(Recurrent)
    with caplog.at_level(logging.WARNING, "selftune"):
        assert_same_runs(eager, compiled, batches(6))
    told = [r for r in caplog.records if "stay eager" in r.message]
    assert len(told) == 1
    assert "the update alone is compiled: " in told[0].message  # and torch's own reason


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("make", [Scaled, Classy])
def test_numbers_changed_on_the_model_are_noticed(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Twin, for which its user turns the same number."""
    eager, compiled = twins(make)

    def assert_noticed(scales: list[float]) -> None:
        for scale in scales:
            for each in (eager, compiled):
                each._steps.inner.model.scale = scale
            assert_same_runs(eager, compiled, batches(1))

    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level("WARNING", "selftune"):
        assert_noticed([1.0, 1.1])
        assert "stay eager" not in caplog.text
        assert_noticed([1.2, 1.3, 1.4])  # more graphs than torch makes of one function
    assert "keeps changing" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_tensors_that_a_model_caches_by_shape_may_change() -> None:
    """Twin; batches of another size are taken eagerly in between."""
    eager, compiled = twins(Cached)
    for size in (8, 5, 8):
        assert_same_runs(eager, compiled, batches(2, size=size))


@pytest.mark.gpu
def test_cuda_graphs_agree_with_eager_steps() -> None:
    """Twin."""
    eager, compiled = twins(normed, device="cuda")
    assert_same_runs(eager, compiled, [tuple(t.cuda() for t in b) for b in batches(20)])


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_many_shapes_end_in_one_graph_for_all() -> None:
    """Twin; at most one more graph for each kind of step."""
    eager, compiled = twins(normed)
    data = [batches(1, size=4 + i % 9)[0] for i in range(120)]
    assert_same_runs(eager, compiled, data[:60])
    before = graphs()
    assert_same_runs(eager, compiled, data[60:])
    assert graphs() - before <= 3


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_shapes_that_torch_cannot_compile_are_trained_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Torch 2.13 has no graph of ``nn.Dropout`` for every shape within ``torch.func``."""
    _, compiled = twins(lambda: nn.Sequential(nn.Dropout(0.3), net()))
    with caplog.at_level(logging.WARNING, "selftune"):
        told = follow(compiled, [batches(1, size=4 + i % 9)[0] for i in range(60)])
    assert caplog.text.count("batches of other shapes are trained eagerly") == 1
    assert (int(compiled.run.step), compiled.compiled) == (60, True)
    assert all(bool(t[0].isfinite()) for t in told)


@pytest.mark.slow
@pytest.mark.parametrize("make", [net, normed])
def test_a_population_compiles(make: Any, request: pytest.FixtureRequest) -> None:
    """Twin; here, as with many weights, every tensor is apart."""
    if make is normed:  # the other one is compiled to C++
        request.getfixturevalue("traced")
    eager, compiled = twins(make, 3)
    assert_same_runs(eager, compiled, batches(6))


def test_what_torch_would_get_wrong_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """Law: a float64 scalar among weights, of which torch 2.13 loses what is written to it."""
    eager, other = twins(Offset, joined=False)
    assert not other.compiled
    assert "not compiled: the model has a float64" in caplog.text
    assert_same_runs(eager, other, batches(4))
    assert other.run.weights[0].any()


def test_eager_steps_write_the_run_in_place() -> None:
    """Twin: the pure steps; no tensor of the run is another one afterwards."""
    one, other = twins(normed, compiled=False)
    held = torch.utils._pytree.tree_leaves(one.run)
    follow(one, batches(6))
    now = torch.utils._pytree.tree_leaves(one.run)
    assert all(a is b for a, b in zip(held, now, strict=True))
    steps, run = other._steps, other.run
    with torch.no_grad():
        for step, batch in enumerate(batches(6), start=1):
            run, _ = steps.train(run, batch, tracked=step % 2 == 0)
            if step % 2 == 0:
                run, _ = steps.tune(run, batch)
    assert_same(one.run, run, rtol=1e-7, atol=1e-9)


def test_signatures_tell_structures_and_shapes_apart() -> None:
    """Law: by shape and dtype, not by value."""
    one: Any = (torch.zeros(2, 3), {"y": torch.zeros(2)})
    assert signature(one) == signature((torch.ones(2, 3), {"y": torch.ones(2)}))
    assert signature(one) != signature((torch.ones(1, 3), {"y": torch.ones(2)}))
    assert signature(one) != signature((torch.ones(2, 3).double(), {"y": torch.ones(2)}))


def test_a_batch_whose_tensors_cannot_be_seen_is_like_no_other() -> None:
    """Law: a graph with tensors inside may be of any shape."""

    class Graph:
        def to(self, device: torch.device) -> Graph:
            return self

    graph = Graph()
    assert signature((graph, 1)) != signature((graph, 1))
    assert signature((torch.ones(2), 1)) == signature((torch.zeros(2), 1))


@pytest.mark.slow
def test_torchs_compiler_is_not_imported_before_it_is_used() -> None:
    """It takes as long to import as torch itself."""
    asked = "import sys, selftune, selftune.search; print('torch._dynamo' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False"]
