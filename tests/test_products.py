"""Products with second derivatives. Truths: the three backends against one another, by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune.functionalize import flat
from selftune.products import BACKENDS, Products


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.out = kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(x)).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.GroupNorm(2, 4), nn.Flatten(),
        nn.LayerNorm(144), nn.Linear(144, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), (5, 4)),
    "conv with norms": (convolutional, (5, 1, 8, 8)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 7, 4)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 7, 4)),
    "transformer": (Attending, (5, 7)),
}


def problem(name: str, dtype: torch.dtype) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A loss with a scale as its hyperparameter, weights and the scale."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    weights, call = flat(make().to(dtype))
    inputs = torch.randint(10, shape) if name == "transformer" else torch.randn(shape, dtype=dtype)
    targets = torch.randint(3, (len(inputs),))

    def loss(params: Tensor, hparams: Any) -> Tensor:
        return F.cross_entropy(call(params, inputs), targets) * hparams["scale"]

    return loss, weights, {"scale": torch.tensor(1.5, dtype=dtype)}


@pytest.mark.parametrize("name", MODELS)
def test_backends_agree_and_push_is_the_transpose_of_pull(name: str) -> None:
    loss, weights, scale = problem(name, torch.float64)
    vector, other = torch.randn_like(weights), torch.randn_like(weights)
    speed = {"scale": torch.tensor(0.7, dtype=torch.float64)}
    found = []
    for backend in BACKENDS:
        products = Products(loss, backend)
        curved, mixed = products.pull(weights, scale)(vector)
        pushed = products.push(weights, scale)(other, speed)
        found.append((curved, mixed["scale"], pushed))
        tolerance = 1e-6 if backend == "differences" else 1e-10
        transposed = curved @ other + mixed["scale"] * speed["scale"]
        assert float(pushed @ vector) == pytest.approx(float(transposed), rel=tolerance, abs=1e-9)
    for backend in found[1:]:
        torch.testing.assert_close(backend, found[0], rtol=1e-6, atol=1e-8)


def test_auto_takes_what_works_and_says_why() -> None:
    loss, weights, scale = problem("LSTM", torch.float32)  # its kernel has no forward derivative
    forward = Products(loss, "forward over reverse")
    with pytest.raises(RuntimeError, match=r"mkldnn_rnn_layer.*Use backend='differences'"):
        forward.pull(weights, scale)
    automatic = Products(loss)
    automatic.pull(weights, scale)
    assert automatic.backend == "double backward"

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.square()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    once = Products(lambda w, h: Once.apply(w).sum())
    weights = torch.arange(3.0, dtype=torch.float64)
    curved, _ = once.pull(weights, {})(torch.ones(3, dtype=torch.float64))
    assert once.backend == "differences"
    assert set(once.refused) == {"double backward", "forward over reverse"}
    torch.testing.assert_close(curved, torch.full((3,), 2.0, dtype=torch.float64))


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="backend='magic' must be 'auto' or one of"):
        Products(lambda w, h: w.sum(), "magic")


@pytest.mark.parametrize("backend", BACKENDS)
def test_curvature_alone_is_that_of_pull(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, v = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    products = Products(lambda w, h: torch.tanh(w).sum() ** 2 * h["a"], backend)
    a = {"a": torch.tensor(1.3, dtype=torch.float64)}
    gradient, product = products.curvature(w, a)
    both, pull = products.linear(w, a)
    assert torch.equal(gradient, both)
    torch.testing.assert_close(product(v), pull(v)[0])


def test_under_autocast_all_that_is_left_out_is_precision() -> None:
    """bfloat16 passes against float32 ones."""
    torch.manual_seed(0)
    weights, call = flat(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    found = []
    for half in (False, True):

        def loss(w: Tensor, h: Any, half: bool = half) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return F.cross_entropy(call(w, x), y)

        products = Products(loss, "double backward")
        found.append(products.pull(weights, {})(torch.ones_like(weights))[0])
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.03


def test_the_random_streams_stay_where_they_are() -> None:
    """A run that is resumed tries its backends anew."""
    loss = lambda w, h: (F.dropout(w, 0.5) ** 4).sum()  # noqa: E731
    before = torch.get_rng_state()
    Products(loss).prepare(torch.ones(9), {})
    assert torch.equal(torch.get_rng_state(), before)


def test_second_derivatives_that_torch_gets_wrong_are_not_used() -> None:
    """Weight norm, whose double backward is not symmetric; truth: differences."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.SiLU(), nn.Linear(8, 3)
    ).double()
    weights, call = flat(model)
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    loss = lambda w, h: F.cross_entropy(call(w, x), y)  # noqa: E731
    products, vector = Products(loss), torch.randn_like(weights)
    found = products.pull(weights, {})(vector)[0]
    truth = Products(loss, "differences").pull(weights, {})(vector)[0]
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)


def test_a_batch_that_has_nothing_to_do_with_the_weights_decides_nothing() -> None:
    products = Products(lambda w, h: torch.zeros((), dtype=w.dtype) + 1.0)
    products.prepare(torch.ones(3), {})
    assert products.backend == "double backward"


def test_differences_step_by_the_weights_that_move() -> None:
    """Few of many weights, as in an embedding; truth: by hand."""
    w = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    few = torch.zeros_like(w)
    few[:8] = 1.0
    product = Products(lambda w, h: (w[:8] ** 4).sum() / 12, "differences").pull(w, {})
    torch.testing.assert_close(product(few)[0][:8], w[:8] ** 2, rtol=0.02, atol=0.02)
