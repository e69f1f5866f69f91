"""GANs. Truths: closed forms of the energy distance, finite differences, the untuned twin."""

import math

import pytest
import torch

from selftune import search
from selftune.search.families import GAN, energy_distance


def test_energy_distance_of_two_points_and_two_others() -> None:
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])
    by_hand = 2 * (2 + 4 + 1 + 3) / 4 - 1 - 2
    assert energy_distance(a, b).item() == pytest.approx(by_hand, rel=1e-4)


def test_it_is_unbiased() -> None:
    """Law: two samples of one distribution have distance 0 in the mean."""
    torch.manual_seed(0)
    found = torch.stack([energy_distance(*torch.randn(2, 16, 3)) for _ in range(400)])
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(400)


def test_the_penalty_s_hypergradient() -> None:
    """Truth: central differences of the look ahead, with the same draws."""
    torch.manual_seed(0)
    gan = GAN(2, latent=3, width=8)
    for net in (gan.generator, gan.critic):
        net.double()
    real, held = torch.randn(2, 32, 2, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:

        def ahead(strength: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(1)
            return gan._unrolled_energy(real, held, strength, [0.5, 0.5])

        strength = torch.tensor(0.7, requires_grad=True)
        ahead(strength).backward(inputs=[strength])
        up, down = (ahead(torch.tensor(0.7 + s)).item() for s in (1e-5, -1e-5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert strength.grad is not None
    assert abs(strength.grad.item()) > 1e-8
    assert strength.grad.item() == pytest.approx((up - down) / 2e-5, rel=1e-4)


@pytest.mark.slow
def test_it_learns_a_distribution() -> None:
    torch.manual_seed(0)
    train, val, test = torch.randn(3, 1000, 2) * torch.tensor([1.0, 0.2]) + 2
    gan = GAN(2, width=32)
    with torch.no_grad():
        before = float(gan.energy(test))
    gan.fit(train, val, 1200)
    with torch.no_grad():
        after = float(gan.energy(test))
    assert before > 1
    assert after < 0.1 * before
    assert len(set(gan.history["critic.lr"])) > 3
    assert gan.penalty != 1.0


def test_a_search_over_it() -> None:
    data = torch.randn(200, 2)

    def trial(space: search.Space) -> float:
        gan = GAN(2, width=space.suggest_categorical("width", (8, 16))).fit(data, data, 20)
        with torch.no_grad():
            return float(gan.energy(data))

    found = search.select(trial, trials=2, progress=False)
    assert found.params["width"] in (8, 16)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="penalty=0"):
        GAN(2, penalty=0)
    with pytest.raises(ValueError, match="val has shape"):
        GAN(2).fit(torch.randn(10, 2), torch.randn(10, 3), 5)


def test_single_examples_are_no_batches() -> None:
    with pytest.raises(ValueError, match="batch=1 must be at least 2"):
        GAN(2).fit(torch.randn(8, 2), torch.randn(8, 2), steps=2, batch=1)
