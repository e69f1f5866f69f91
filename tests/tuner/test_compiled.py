"""Compiled steps against the same steps taken eagerly, and what happens where torch refuses."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import selftune as st
from selftune.bilevel import Bilevel
from selftune.fused import Fused, signature
from selftune.hypervector import HyperVector
from selftune.tuner._objective import Objective, for_tuning
from selftune.update import Update

Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unsqueeze(1))[0][:, -1])


def normed() -> nn.Module:
    # No bias before the norm: its gradient is rounding alone, which AdamW would blow up.
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def batches(count: int, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(size, n, generator=generator).double()  # noqa: E731
    return [(draw(4), draw(2)) for _ in range(count)]


class Scaled(nn.Module):
    """A model with a number that its user turns while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(4, 2), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def make(model: nn.Module, population: int | None = None, device: str = "cpu") -> Fused:
    rule = st.rules.AdamW()
    update, values = Update(rule), {"decay": 0.0, **rule.defaults}
    tune = ("lr", "beta1", "weight_decay")
    objective = Objective(model.double().to(device), F.mse_loss, None)
    bilevel = Bilevel(
        objective, for_tuning(objective, 2), update,
        {k: v for k, v in values.items() if k not in tune},
        HyperVector(update.hparams, tune, horizon=100),
        st.Trace(stride=2), None, st.Average(),
        torch.ones(1, dtype=torch.float64, device=device),
    )  # fmt: skip
    run = bilevel.init(values)
    if population:
        run = tree_map(lambda t: torch.stack([t] * population), run)
    return Fused(bilevel, tree_map(torch.clone, run), population)


def follow(fused: Fused, data: list[Batch]) -> list[Tensor]:
    told = []
    for step, batch in enumerate(data, start=1):
        told.append(fused.train(batch) if step % 2 else fused.tune(batch, batch))
    return [t.clone() for t in told]


def assert_same_runs(one: Fused, other: Fused, data: list[Batch]) -> None:
    for a, b in zip(follow(one, data), follow(other, data), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    for a, b in zip(tree_leaves(one.run), tree_leaves(other.run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_compiled_steps_agree_with_eager_ones_to_rounding() -> None:
    eager, compiled = make(normed()), make(normed())
    for a, b in zip(tree_leaves(compiled.run), tree_leaves(eager.run), strict=True):
        a.copy_(b)
    compiled.compile()
    assert_same_runs(eager, compiled, batches(10))
    # A shorter last batch is taken eagerly, by the same function, and no new graph is made.
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same_runs(eager, compiled, batches(4, size=5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_model_torch_cannot_compile_stays_eager_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    eager, compiled = make(Recurrent()), make(Recurrent())
    for a, b in zip(tree_leaves(compiled.run), tree_leaves(eager.run), strict=True):
        a.copy_(b)
    compiled.compile()
    with caplog.at_level(logging.WARNING, "selftune"):
        assert_same_runs(eager, compiled, batches(6))
    told = [r for r in caplog.records if "stay eager" in r.message]
    assert len(told) == 1
    assert "the update alone is compiled: " in told[0].message  # and torch's own reason


def test_numbers_changed_on_the_model_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    eager, compiled = make(Scaled()), make(Scaled())
    for a, b in zip(tree_leaves(compiled.run), tree_leaves(eager.run), strict=True):
        a.copy_(b)
    compiled.compile()

    def assert_noticed(scales: list[float]) -> None:
        for scale in scales:
            for fused in (eager, compiled):
                fused._bilevel.inner.model.scale = scale
            assert_same_runs(eager, compiled, batches(1))

    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level("WARNING", "selftune"):
        assert_noticed([1.0, 1.1])
        assert "stay eager" not in caplog.text
        assert_noticed([1.2, 1.3, 1.4])  # more graphs than torch makes of one function
    assert "keeps changing" in caplog.text


@pytest.mark.gpu
def test_cuda_graphs_agree_with_eager_steps() -> None:
    eager, compiled = make(normed(), device="cuda"), make(normed(), device="cuda")
    for a, b in zip(tree_leaves(compiled.run), tree_leaves(eager.run), strict=True):
        a.copy_(b)
    compiled.compile()
    data = [tuple(t.cuda() for t in batch) for batch in batches(20)]
    assert_same_runs(eager, compiled, data)


@pytest.mark.slow
def test_many_shapes_end_in_one_graph_for_all() -> None:
    eager, compiled = make(normed()), make(normed())
    for a, b in zip(tree_leaves(compiled.run), tree_leaves(eager.run), strict=True):
        a.copy_(b)
    compiled.compile()
    data = [batches(1, size=4 + i % 9)[0] for i in range(120)]
    assert_same_runs(eager, compiled, data[:60])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same_runs(eager, compiled, data[60:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


@pytest.mark.slow
def test_a_population_compiles() -> None:
    eager, compiled = make(normed(), 3), make(normed(), 3)
    for a, b in zip(tree_leaves(compiled.run), tree_leaves(eager.run), strict=True):
        a.copy_(b)
    compiled.compile()
    assert_same_runs(eager, compiled, batches(6))


def test_signatures_tell_structures_and_shapes_apart() -> None:
    one: Any = (torch.zeros(2, 3), {"y": torch.zeros(2)})
    assert signature(one) == signature((torch.ones(2, 3), {"y": torch.ones(2)}))
    assert signature(one) != signature((torch.ones(1, 3), {"y": torch.ones(2)}))
    assert signature(one) != signature((torch.ones(2, 3).double(), {"y": torch.ones(2)}))


def test_a_batch_whose_tensors_cannot_be_seen_is_like_no_other() -> None:
    class Graph:
        def to(self, device: torch.device) -> "Graph":
            return self

    graph = Graph()
    assert signature((graph, 1)) != signature((graph, 1))
    assert signature((torch.ones(2), 1)) == signature((torch.zeros(2), 1))


def test_torchs_compiler_is_not_imported_before_it_is_used():
    """It takes as long to import as torch itself."""
    asked = "import sys, selftune, selftune.search; print('torch._dynamo' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False"]
