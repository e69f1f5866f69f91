"""Generative adversarial networks for vectors, with both players self-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from selftune._arguments import Whole, check
from selftune.optim import Adam

EVERY = 5
"""Steps of a player between two hyperparameter steps."""
HYPER_RATE = 0.05
"""Learning rate of Adam on the log of the penalty's strength."""


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased estimate of ``2 E‖a − b‖ − E‖a − a′‖ − E‖b − b′‖``; 0 for equal distributions.

    Args:
        a: Shape (n, features).
        b: Shape (m, features).

    Examples:
        >>> a = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> float(energy_distance(a, a + 3)) > 1
        True

    Source: Székely & Rizzo 2013, equation 5.
    """
    n, m = len(a), len(b)
    within_a = _distances(a, a).sum() / (n * (n - 1))
    within_b = _distances(b, b).sum() / (m * (m - 1))
    return 2 * _distances(a, b).mean() - within_a - within_b


def _distances(a: Tensor, b: Tensor) -> Tensor:
    square = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
    return (square + 1e-12).sqrt() - 1e-6  # differentiable at distance 0


@dataclass
class GAN:
    """A generator and a critic for vectors (WGAN-GP), trained by :meth:`fit`.

    Each player's optimizer tunes its own hyperparameters on held-out data: the generator
    on the energy distance of its samples to that data, the critic on how well it tells the two
    apart. The strength λ of the gradient penalty affects the generator through the critic; its
    hypergradient differentiates through one step of both players::

        dE/dλ,  E = energy(G(w_G − η_G ∇L_G(w_G, w_D′))),  w_D′ = w_D − η_D ∇(L_D + λ P)(w_D)

    Args:
        features: Number of features per example.
        latent: Dimension of the generator's latent vectors.
        width: Width of the two hidden layers of both networks.
        penalty: Initial value of λ.
        every: Steps between updates of λ.

    Attributes:
        generator: Maps latent vectors to samples.
        critic: Returns a score that is higher for real examples.
        history: Lists by name: ``energy``, ``generator.lr``, ``critic.lr``, ``penalty``.

    Source: Gulrajani et al. 2017 (WGAN-GP); Metz et al. 2017 for the unrolled step.
    """

    features: int
    latent: int = 8
    width: int = 64
    penalty: float = 1.0
    every: int = 10
    generator: nn.Module = field(init=False)
    critic: nn.Module = field(init=False)
    history: dict[str, list[float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise ValueError(f"penalty={self.penalty} must be above 0: it is tuned in log space")
        self.generator = _net(self.latent, self.width, self.features)
        self.critic = _net(self.features, self.width, 1)

    def sample(self, count: int) -> Tensor:
        """Draw samples, shape (count, features)."""
        return self.generator(torch.randn(count, self.latent))

    def fit(
        self, train: Tensor, val: Tensor, steps: int, *, batch: int = 64, lr: float = 1e-3
    ) -> GAN:
        """Train both players.

        Args:
            train: Real examples, shape (n, features).
            val: Held-out examples used for tuning.
            steps: Number of generator steps; the critic takes the same number.
            batch: Batch size.
            lr: Initial learning rate of both players.

        Returns:
            The object itself.

        Raises:
            ValueError: The examples have the wrong shape, or there are too few.
        """
        for name, data in (("train", train), ("val", val)):
            if data.ndim != 2 or data.shape[1] != self.features or len(data) < 2:
                raise ValueError(
                    f"{name} has shape {tuple(data.shape)}, but must have shape (at least 2, "
                    f"{self.features})"
                )
        check({"batch": Whole(least=2)}, {"batch": batch})  # single examples are left out
        # Each player is a moving target for the other, tracked better by frequent small steps.
        options = dict(
            lr=lr, betas=(0.5, 0.9), probe=False, total_steps=steps, guard=False, every=EVERY
        )
        players = Adam(self.generator, **options), Adam(self.critic, **options)  # type: ignore[arg-type]
        strength = torch.tensor(self.penalty).log().requires_grad_()
        hyper = torch.optim.Adam([strength], lr=HYPER_RATE)
        real, held_out = _endless(train, batch), _endless(val, min(4 * batch, len(val)))
        for step in range(1, steps + 1):
            self._critic_step(players[1], next(real), float(strength.detach().exp()))
            players[1].hyper_step(lambda: self._critic_loss(next(held_out)))
            self._generator_step(players[0], batch)
            players[0].hyper_step(lambda: self.energy(next(held_out)))
            if step % self.every == 0:
                rates = [float(p.param_groups[0]["lr"]) for p in players]
                energy = self._unrolled_energy(next(real), next(held_out), strength.exp(), rates)
                (slope,) = torch.autograd.grad(energy, strength)
                if bool(torch.isfinite(slope)):  # else keep λ until the next update
                    strength.grad = slope
                    hyper.step()
                self._note(next(held_out), rates, float(strength.detach().exp()))
        for net, player in zip((self.generator, self.critic), players, strict=True):
            with player.averaged():
                averaged = {k: v.clone() for k, v in net.state_dict().items()}
            net.load_state_dict(averaged)
        self.penalty = float(strength.detach().exp())
        return self

    def energy(self, held_out: Tensor) -> Tensor:
        """Energy distance between the held-out examples and as many samples."""
        return energy_distance(self.sample(len(held_out)), held_out)

    # the players

    def _critic_loss(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.sample(len(real))
        return self.critic(fake).mean() - self.critic(real).mean()

    def _critic_step(self, player: Adam, real: Tensor, strength: float) -> None:
        player.zero_grad()
        weights: dict[str, Tensor] = dict(self.critic.named_parameters())
        with torch.no_grad():
            fake = self.sample(len(real))
        penalty = self._penalty(weights, real, fake)
        (self._told(weights, real, fake) + strength * penalty).backward()
        player.step()

    def _generator_step(self, player: Adam, batch: int) -> None:
        player.zero_grad()
        loss = -self.critic(self.sample(batch)).mean()
        grads = torch.autograd.grad(loss, list(self.generator.parameters()))
        for param, grad in zip(self.generator.parameters(), grads, strict=True):
            param.grad = grad
        player.step()

    def _told(self, weights: dict[str, Tensor], real: Tensor, fake: Tensor) -> Tensor:
        critic = lambda x: functional_call(self.critic, weights, (x,))  # noqa: E731
        return critic(fake).mean() - critic(real).mean()

    def _penalty(self, weights: dict[str, Tensor], real: Tensor, fake: Tensor) -> Tensor:
        """``E (‖∇_x D(x)‖ − 1)²`` between real examples and samples."""
        mix = torch.rand(len(real), 1)
        x = (mix * real + (1 - mix) * fake).requires_grad_()
        out = functional_call(self.critic, weights, (x,)).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return ((slope.square().sum(1) + 1e-12).sqrt() - 1).square().mean()

    def _unrolled_energy(
        self, real: Tensor, held_out: Tensor, strength: Tensor, rates: list[float]
    ) -> Tensor:
        """The energy distance after one plain step of both players, differentiable in λ."""
        critic = {n: p.detach().requires_grad_() for n, p in self.critic.named_parameters()}
        maker = {n: p.detach().requires_grad_() for n, p in self.generator.named_parameters()}
        with torch.no_grad():
            fake = self.sample(len(real))
        loss = self._told(critic, real, fake) + strength * self._penalty(critic, real, fake)
        critic = _stepped(critic, loss, rates[1])
        made = functional_call(self.generator, maker, (torch.randn(len(real), self.latent),))
        maker = _stepped(maker, -functional_call(self.critic, critic, (made,)).mean(), rates[0])
        draws = torch.randn(len(held_out), self.latent)
        return energy_distance(functional_call(self.generator, maker, (draws,)), held_out)

    def _note(self, held_out: Tensor, rates: list[float], strength: float) -> None:
        with torch.no_grad():
            energy = float(self.energy(held_out))
        names = ("energy", "generator.lr", "critic.lr", "penalty")
        for name, value in zip(names, (energy, *rates, strength), strict=True):
            self.history.setdefault(name, []).append(value)


def _stepped(weights: dict[str, Tensor], loss: Tensor, rate: float) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    return {n: w - rate * g for (n, w), g in zip(weights.items(), grads, strict=True)}


def _net(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )  # fmt: skip


def _endless(data: Tensor, batch: int) -> Iterator[Tensor]:
    while True:
        for part in data[torch.randperm(len(data))].split(batch):
            if len(part) > 1:
                yield part
