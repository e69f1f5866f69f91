"""Gradients of pure functions. Truth: torch.func."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from selftune._gradient import gradient, pulling


def loss(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    first, second, _ = params
    seen = (first * second).tanh()
    return seen.square().sum(), [seen]


def params() -> list[Tensor]:
    return [torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5), torch.ones(3)]


def test_both_ways_give_the_same() -> None:
    transformed = gradient(loss, params())
    with torch.no_grad():
        plain = gradient(loss, params())
    for a, b in zip(transformed[0], plain[0], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(plain[0][2], torch.zeros(3))  # which the loss does not use
    torch.testing.assert_close(transformed[1:], plain[1:])
    assert not any(t.requires_grad for t in (*plain[0], plain[1], *plain[2]))


def test_a_loss_that_depends_on_nothing_has_gradients_of_zero() -> None:
    with torch.no_grad():
        grads, value, _ = gradient(lambda p: (torch.ones(()), []), params())
    assert float(value) == 1
    assert not any(bool(g.any()) for g in grads)


def test_it_can_be_differentiated_and_mapped() -> None:
    second = torch.func.grad(lambda p: gradient(loss, [p, *params()[1:]])[0][0].sum())(params()[0])
    step = 1e-3
    up, down = (gradient(loss, [params()[0] + s, *params()[1:]])[0][0] for s in (step, -step))
    torch.testing.assert_close(second, (up - down) / (2 * step), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        many = torch.func.vmap(lambda p: gradient(loss, [p, *params()[1:]])[0][0])(
            torch.stack([params()[0]] * 2)
        )
        torch.testing.assert_close(many[1], gradient(loss, params())[0][0])


def test_the_way_back_of_several_outputs() -> None:
    model = nn.LSTM(3, 4, batch_first=True)
    weights = model.weight_hh_l0.detach()
    x = torch.randn(2, 5, 3)
    run = lambda w: functional_call(model, {"weight_hh_l0": w}, (x,))  # noqa: E731
    found = []
    for plainly in (False, True):
        with torch.set_grad_enabled(not plainly):
            out, pull = pulling(run, weights)
            found.append(pull(torch.utils._pytree.tree_map(torch.ones_like, out)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
