"""Tunable layers, against their formulas, finite differences of expectations, and laws."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import selftune as st
from selftune.nn._base import uniform

IMAGES: dict[str, Callable[[float], Any]] = {
    "Dropout": lambda s: st.nn.Dropout(s),
    "Dropout, shared": lambda s: st.nn.Dropout(s, share=(1,)),
    "Dropout2d": lambda s: st.nn.Dropout2d(s),
    "Noise": lambda s: st.nn.Noise(s),
    "Brightness": lambda s: st.nn.Brightness(s),
    "Contrast": lambda s: st.nn.Contrast(s),
    "Scale": lambda s: st.nn.Scale(s),
    "Translate": lambda s: st.nn.Translate(s),
    "Cutout": lambda s: st.nn.Cutout(s),
    "ActivationPenalty": lambda s: st.nn.ActivationPenalty(s),
    "TemporalPenalty": lambda s: st.nn.TemporalPenalty(s),
}
each = pytest.mark.parametrize("name", IMAGES)


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.1


@each
def test_nothing_happens_in_evaluation_mode_or_at_zero(name: str) -> None:
    x = images()
    assert torch.equal(IMAGES[name](0.3).eval()(x), x)
    torch.testing.assert_close(IMAGES[name](0.0)(x), x, rtol=1e-5, atol=1e-5)


@each
def test_the_same_counter_draws_the_same_and_each_pass_moves_it(name: str) -> None:
    layer = IMAGES[name](0.3)
    twin = copy.deepcopy(layer)
    first = layer(images())
    assert torch.equal(first, twin(images()))
    if isinstance(layer, st.nn.Stochastic):
        assert not torch.equal(first, layer(images()))


@each
def test_a_strength_for_each_example_does_what_it_does_alone(name: str) -> None:
    layer, x = IMAGES[name](0.3), images(4)
    if "Penalty" in name:
        layer.strength = torch.tensor([0.3, 0.0, 0.0, 0.0])
        layer(x)
        got = st.nn.extra_loss(layer)
        layer.strength = torch.tensor([0.3])
        layer(x[:1])
        torch.testing.assert_close(got, st.nn.extra_loss(layer) / 4)
        return
    whole = copy.deepcopy(layer)(x)
    layer.strength = torch.tensor([0.3, 0.0, 0.3, 0.3])
    mixed = layer(x)
    torch.testing.assert_close(mixed[1], x[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[[0, 2, 3]], whole[[0, 2, 3]])


@each
@pytest.mark.parametrize("edge", ["zero", "lower", "upper"])
def test_gradients_are_finite_at_zero_and_at_the_bounds(name: str, edge: str) -> None:
    layer = IMAGES[name](0.3)
    value = {"zero": 0.0, "lower": layer.hparam.lower, "upper": layer.hparam.upper}[edge]
    strength = torch.full((1,), value, requires_grad=True)
    x = images().requires_grad_()
    layer.strength = strength
    loss = layer(x).square().mean() + st.nn.extra_loss(layer)
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss, [strength, x]))


@each
def test_strengths_outside_their_bounds_are_refused(name: str) -> None:
    for value in (-0.1, 1e3, math.nan):
        with pytest.raises(ValueError, match=r"(p|value)=\S+ must be (0 or between|a number)"):
            IMAGES[name](value)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_what_dropout_drops(p: float) -> None:
    found = st.nn.Dropout(p)(torch.ones(400, 500))
    assert float((found == 0).double().mean()) == pytest.approx(p, abs=0.005)
    assert float(found.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["entries", "weights", "words"])
def test_dropout_in_half_precision_keeps_the_mean_and_drops_a_share_p(
    kind: str, p: float, dtype: torch.dtype
) -> None:
    """Random numbers rounded to bfloat16 would drop fewer: the mean was 1.04 at p = 0.95."""
    size = 400_000
    if kind == "entries":
        output = st.nn.Dropout(p)(torch.ones(size, dtype=dtype))
    elif kind == "weights":
        linear = nn.Linear(size, 1, bias=False, dtype=dtype)
        nn.init.ones_(linear.weight)
        dropping = st.nn.DropConnect(linear, p)
        (output,) = torch.autograd.grad(
            dropping(torch.ones(1, size, dtype=dtype)).sum(), [linear.weight]
        )
    else:
        words = nn.Embedding.from_pretrained(torch.ones(size, 1, dtype=dtype))
        output = st.nn.EmbeddingDropout(words, p)(torch.arange(size))
    assert output.dtype == dtype
    error = math.sqrt(p * (1 - p) / size)
    assert abs(float((output == 0).float().mean()) - p) < 4 * error


@pytest.mark.parametrize(
    "name", ["Dropout", "Noise", "Brightness", "Contrast", "Scale", "Translate"]
)
def test_integers_are_refused(name: str) -> None:
    """A strength below 1 would be rounded to 0 in them."""
    with pytest.raises(TypeError, match=r"torch.uint8.*input.float\(\)"):
        IMAGES[name](0.3)((images() * 255).to(torch.uint8))


@pytest.mark.parametrize("name", ["Noise", "Brightness", "Contrast", "ActivationPenalty"])
def test_complex_inputs_keep_their_type(name: str) -> None:
    x = torch.complex(images(), images())
    assert IMAGES[name](0.3)(x).dtype == torch.complex64


def test_dimensions_that_the_input_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="no dimension 7"):
        st.nn.Dropout(0.5, share=(0, 7))(torch.ones(3, 4))


def test_a_sequence_of_length_1_has_no_temporal_penalty() -> None:
    net = nn.Sequential(st.nn.TemporalPenalty(1.0))
    net(torch.randn(3, 1, 4))
    assert float(st.nn.extra_loss(net)) == 0


def test_draws_are_uniform_and_independent_of_one_another() -> None:
    key = torch.tensor([7])
    first, second = st.nn.uniform(key, (200, 500)), st.nn.uniform(key + 1, (200, 500))
    for draw in (first, second, st.nn.uniform(key, (200, 500), stream=1)):
        counts = torch.histc(draw, 50, 0, 1)
        chi2 = float(((counts - 2000).square() / 2000).sum())
        assert chi2 < 49 + 5 * math.sqrt(98)  # mean and spread of its distribution
    for other in (second, st.nn.uniform(key, (200, 500), stream=1), first.roll(1, 0)):
        together = torch.stack([first.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(together)[0, 1])) < 5 / math.sqrt(first.numel())


def test_dropouts_derivative_is_that_of_the_expected_loss() -> None:
    # E[(w·x(1 + e))²] = (w·x)² + p/(1 − p) Σ (w x)²: the second moment is all there is of it.
    x, w = torch.randn(50, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 50)
    layer, p = st.nn.Dropout(0.3), torch.full((1,), 0.3, requires_grad=True)
    layer.strength = p
    loss = (layer(x.expand(20_000, -1)) @ w).square().mean()
    (found,) = torch.autograd.grad(loss, p)
    assert float(found) == pytest.approx(float((w * x).square().sum() / 0.7**2), rel=0.05)


def test_a_shared_draw_is_the_same_along_its_dimension() -> None:
    found = st.nn.Dropout(0.5, share=(1,))(torch.ones(8, 5, 32))
    assert bool((found == found[:, :1]).all())
    assert 0.3 < float((found == 0).float().mean()) < 0.7


@pytest.mark.parametrize("module", [nn.LSTM(4, 6, 2), nn.GRU(4, 6), nn.RNN(4, 6)])
def test_drop_connect_drops_hidden_weights_of_recurrent_modules(module: nn.Module) -> None:
    layer = st.nn.DropConnect(copy.deepcopy(module), 0.5)
    assert all(n.startswith("weight_hh") for n in layer.weights)
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(layer.eval()(x)[0], module(x)[0])
    first, second = layer.train()(x)[0], layer(x)[0]
    assert not torch.allclose(first, second)
    first.sum().backward()
    kept = module.weight_hh_l0.detach() != 0
    grads = layer.module.weight_hh_l0.grad
    assert 0.2 < float((grads[kept] == 0).float().mean()) < 0.8


def test_drop_connect_refuses_what_the_module_does_not_have() -> None:
    with pytest.raises(ValueError, match="this module has"):
        st.nn.DropConnect(nn.Linear(2, 2), weights=["weight_hh_l0"])
    with pytest.raises(ValueError, match="this module has"):
        st.nn.DropConnect(nn.ReLU())


def test_whole_words_are_dropped() -> None:
    layer = st.nn.EmbeddingDropout(nn.Embedding(50, 4), 0.5)
    words = torch.arange(50).repeat(2, 1)
    gone = (layer(words) == 0).all(-1)
    assert torch.equal(gone[0], gone[1])
    assert 10 < int(gone[0].sum()) < 40
    torch.testing.assert_close(layer.eval()(words), layer.embedding(words))


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "sequences", "ignored"])
def test_label_smoothing_is_that_of_torch(epsilon: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 5, 3) if kind == "sequences" else (6, 5)
    output = torch.randn(shape, generator=generator)
    target = torch.randint(5, (6, *shape[2:]), generator=generator)
    if kind == "probabilities":
        target = torch.rand(6, 5, generator=generator).softmax(1)
    if kind == "ignored":
        target[:2] = -100
    loss_fn = st.nn.LabelSmoothing(epsilon)
    expected = F.cross_entropy(output, target, label_smoothing=epsilon)
    torch.testing.assert_close(loss_fn(output, target), expected)
    torch.testing.assert_close(loss_fn.eval()(output, target), F.cross_entropy(output, target))


def test_cutout_cuts_as_many_holes_as_it_is_told_on_average() -> None:
    x = torch.ones(4000, 1, 10, 10)
    once = float(1 - st.nn.Cutout(1.0, size=0.2)(x).mean())
    assert once == pytest.approx(0.04 * 0.9**2, abs=0.01)  # holes at the edge are cut off
    half = float(1 - st.nn.Cutout(0.5, size=0.2)(x).mean())
    assert half == pytest.approx(once / 2, rel=0.1)


@pytest.mark.parametrize("name", ["Scale", "Translate", "Cutout"])
def test_inputs_that_are_no_images_are_refused(name: str) -> None:
    match = rf"{name}\(name='{name.lower()}'\) got an input of shape \(16, 8\): pass images, "
    with pytest.raises(ValueError, match=match):
        IMAGES[name](0.3)(torch.randn(16, 8))


@each
def test_an_empty_batch_passes_through(name: str) -> None:
    assert IMAGES[name](0.3)(images()[:0]).shape == (0, 3, 12, 12)


def test_mixup_mixes_targets_as_inputs() -> None:
    mixup = st.nn.Mixup(classes=4, value=0.9)
    inputs = F.one_hot(torch.arange(4), 4).float()
    mixed, target = mixup(inputs, torch.arange(4))
    torch.testing.assert_close(mixed, target)
    assert bool((mixed.diagonal() >= 0.55 - 1e-6).all())
    plain = torch.arange(4)
    assert mixup.eval()(inputs, plain)[1] is plain
    values = torch.randn(4, 1)
    assert st.nn.Mixup(classes=0, value=0.5)(inputs, values)[1].shape == values.shape


@pytest.mark.parametrize(
    ("classes", "target"), [(0, torch.tensor([0, 1, 2, 0])), (3, torch.rand(4, 3))]
)
def test_mixup_names_targets_of_another_kind(classes: int, target: Tensor) -> None:
    with pytest.raises(
        TypeError, match=rf"Mixup\(classes={classes}\) got targets of {target.dtype}"
    ):
        st.nn.Mixup(classes)(torch.rand(4, 2), target)


def test_penalties_are_taken_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), st.nn.ActivationPenalty(0.5), st.nn.TemporalPenalty(2.0))
    found = net(torch.randn(2, 4, 3))
    expected = 0.5 * found.square().mean() + 2 * found.diff(dim=1).square().mean()
    torch.testing.assert_close(st.nn.extra_loss(net), expected)
    assert st.nn.extra_loss(net) == 0


class Twice(nn.Module):
    """Uses one penalty for two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.penalty = st.nn.ActivationPenalty(0.5)

    def part(self, x: Tensor) -> Tensor:
        return self.penalty(self.second(x).tanh())

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        hidden = self.penalty(self.first(x))
        return checkpoint(self.part, hidden, use_reentrant=False) if again else self.part(hidden)

    def expected(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return 0.5 * (hidden.square().mean() + self.second(hidden).tanh().square().mean())


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("again", [False, True], ids=["plain", "activation checkpoint"])
def test_a_penalty_used_twice_counts_twice(again: bool) -> None:
    """The formula; a checkpoint's second pass is not one more use."""
    net, x = Twice(), torch.randn(4, 3)
    for _ in range(2):
        st.nn.begin_pass(net)
        net(x, again)
        extra = st.nn.extra_loss(net)
        torch.testing.assert_close(extra, net.expected(x))
        torch.testing.assert_close(gradients(net, extra), gradients(net, net.expected(x)))
    output = net(x)  # not begun
    torch.testing.assert_close(st.nn.extra_loss(net), 0.5 * output.square().mean())


def test_a_siamese_model_counts_both_passes() -> None:
    net, (x, y) = Twice(), torch.randn(2, 4, 3)
    st.nn.begin_pass(net)
    loss = (net(x) - net(y)).square().mean()
    extra = st.nn.extra_loss(net)
    torch.testing.assert_close(extra, net.expected(x) + net.expected(y))
    (loss + extra).backward()


@pytest.mark.parametrize("kind", ["backward", "no_grad", "eval", "nothing", "vmap"])
def test_a_pass_whose_penalties_nobody_takes_is_not_added_to_the_next(kind: str) -> None:
    net, (x, other) = Twice(), torch.randn(2, 4, 3)
    for _ in range(3):
        if kind == "backward":
            net(other).sum().backward()
        elif kind == "vmap":
            torch.func.vmap(net)(other)
        elif kind == "nothing":
            net(other)
        else:
            with torch.no_grad():
                net.train(kind == "no_grad")(other)
        output = net.train()(x)
        torch.testing.assert_close(st.nn.extra_loss(net), 0.5 * output.square().mean())
        st.nn.begin_pass(net)
        net(x)
        torch.testing.assert_close(st.nn.extra_loss(net), net.expected(x))


def test_a_pass_in_progress_keeps_no_model_alive_and_is_not_copied() -> None:
    net, x = Twice(), torch.randn(4, 3)
    net(x)
    copied = copy.deepcopy(net)
    assert st.nn.extra_loss(copied) == 0
    copied(x)
    torch.testing.assert_close(st.nn.extra_loss(copied), st.nn.extra_loss(net))
    copied(x)
    layer = weakref.ref(copied.penalty)
    del copied
    gc.collect()
    assert layer() is None


@pytest.mark.slow
def test_a_compiled_model_has_the_penalties_of_its_last_uses() -> None:
    """As one that is not compiled; passes without ``extra_loss`` are not added."""
    net, x = Twice(), torch.randn(4, 3)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        output = compiled(x)
        extra = st.nn.extra_loss(net)
        torch.testing.assert_close(extra, 0.5 * output.square().mean())
        (output.sum() + extra).backward()
        compiled(x).sum().backward()  # as in the closure of hyper_step


def test_strengths_are_found_by_name_and_counters_told_apart() -> None:
    layer = st.nn.Dropout(0.2, name="hidden")
    net = nn.Sequential(st.nn.Dropout(0.1), layer, nn.Sequential(copy.deepcopy(layer)))
    found = st.nn.tunables(net)
    assert {n: f.buffers for n, f in found.items()} == {
        "dropout": ["0.strength"], "hidden": ["1.strength", "2.0.strength"]
    }  # fmt: skip
    st.nn.own_counters(net)
    assert len({int(m.key) for m in net.modules() if isinstance(m, st.nn.Stochastic)}) == 3


@pytest.mark.parametrize("other", [st.nn.Dropout(0.3, name="x"), st.nn.Noise(0.2, name="x")])
def test_layers_of_one_name_that_differ_are_refused(other: nn.Module) -> None:
    with pytest.raises(ValueError, match="share the name 'x'"):
        st.nn.tunables(nn.Sequential(st.nn.Dropout(0.2, name="x"), other))


@pytest.mark.slow
def test_compiled_layers_draw_and_differentiate_the_same() -> None:
    """Twin; one graph for all layers compiles faster than one each."""
    layers = {name: make(0.3) for name, make in IMAGES.items()}

    def gradients(x: Tensor, strength: Tensor, key: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        def loss(x: Tensor, strength: Tensor, layer: nn.Module) -> Tensor:
            buffers = {"strength": strength}
            if isinstance(layer, st.nn.Stochastic):
                buffers["key"] = key.clone()
            found = torch.func.functional_call(layer, buffers, (x,)).square().mean()
            return found + st.nn.extra_loss(layer)

        return {n: torch.func.grad(loss, argnums=(0, 1))(x, strength, m) for n, m in layers.items()}

    args = (images(), torch.tensor([0.3]), torch.tensor([5]))
    torch.compiler.reset()  # it compiles the same function only so many times
    compiled = torch.compile(gradients, fullgraph=True, options={"cpp_wrapper": True})
    for _ in range(50):  # what writes where it must not is seen sooner or later
        found = compiled(*args)
    torch.testing.assert_close(found, gradients(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [7, 50])
def test_compiled_draws_fill_shapes_that_do_not_fit_the_vectors_of_the_machine(count: int) -> None:
    """Against the eager draws: a compiled loop over the positions must not end early."""
    key = torch.tensor([5])
    torch.compiler.reset()
    compiled = torch.compile(lambda key: uniform(key, (count,)), fullgraph=True)
    assert torch.equal(compiled(key), uniform(key, (count,)))


def test_normal_numbers_are_finite_at_the_largest_uniform_one() -> None:
    """Law: this counter draws 1 − 2⁻²⁴, the largest number, among others; its quantile is 5.3."""
    layer = st.nn.Noise(1.0)
    layer.key.fill_(87)
    drawn = layer(torch.zeros(100_000))
    assert 5.2 < float(drawn.max()) < 5.6
    assert torch.isfinite(drawn).all()
