"""Other libraries doing the same job: weight steps, then hypergradients on a validation batch.

Each contender takes ``CYCLE`` steps of SGD with momentum and then gives dL_val/dh for the learning
rate and weight decay, as far as it can. Hyperparameters stay where they are.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from benchmarks.cost.nets import Batch, Net

CYCLE, TERMS = 20, 10
LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
SCALE = 0.1
"""Of the Neumann series."""


class Peer(ABC):
    """A contender.

    Args:
        net: What is trained.
        dtype: Of its weights.
    """

    like: str
    """Which of our estimators does the same."""

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = net
        self.model: nn.Module = net.make().to(dtype)
        self.lr = torch.tensor(LR, dtype=dtype, requires_grad=True)
        self.decay = torch.tensor(DECAY, dtype=dtype, requires_grad=True)

    def loss(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """Of a model on a batch."""
        return self.net.loss((model or self.model)(batch[0]), batch[1])

    @abstractmethod
    def cycle(self, batches: list[Batch], outer: Batch) -> dict[str, Tensor]:
        """Steps on the batches, then hypergradients."""


class Higher(Peer):
    """higher: unrolled through copies of the model."""

    like = "Unrolled"

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(net, dtype)
        self.opt = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY
        )

    def cycle(self, batches: list[Batch], outer: Batch) -> dict[str, Tensor]:
        """Unroll; weights and momentum are carried over by hand."""
        import higher

        override = {"lr": [self.lr], "weight_decay": [self.decay]}
        with higher.innerloop_ctx(self.model, self.opt, override=override) as (model, opt):
            for batch in batches:
                opt.step(self.loss(batch, model))
            found = torch.autograd.grad(self.loss(outer, model), [self.lr, self.decay])
            with torch.no_grad():
                last = list(model.parameters())
                for i, (mine, new) in enumerate(zip(self.model.parameters(), last, strict=True)):
                    mine.copy_(new)
                    buffer = opt.state[0][i]["momentum_buffer"]
                    self.opt.state[mine]["momentum_buffer"] = buffer.detach().clone()
        return dict(zip(("lr", "weight_decay"), found, strict=True))


class TorchOpt(Peer):
    """torchopt: unrolled through its MetaSGD; weight decay as a term of the loss."""

    like = "Unrolled"

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(net, dtype)
        import torchopt

        self.torchopt = torchopt
        self.opt = torchopt.MetaSGD(self.model, lr=self.lr, momentum=MOMENTUM)

    def cycle(self, batches: list[Batch], outer: Batch) -> dict[str, Tensor]:
        """Unroll, then cut the graph."""
        for batch in batches:
            square = sum(p.square().sum() for p in self.model.parameters())
            self.opt.step(self.loss(batch) + self.decay / 2 * square)
        found = torch.autograd.grad(self.loss(outer), [self.lr, self.decay])
        self.torchopt.stop_gradient(self.model)
        self.torchopt.stop_gradient(self.opt)
        return dict(zip(("lr", "weight_decay"), found, strict=True))


class Betty(Peer):
    """betty-ml: its Neumann series, called directly; weight decay only."""

    like = "Implicit through the loss"

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(net, dtype)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)

    def penalised(self, batch: Batch) -> Tensor:
        """The training loss with weight decay."""
        square = sum(p.square().sum() for p in self.model.parameters())
        return self.loss(batch) + self.decay / 2 * square

    def cycle(self, batches: list[Batch], outer: Batch) -> dict[str, Tensor]:
        """Plain steps, then the series."""
        from betty.hypergradient.neumann import neumann

        for batch in batches:
            self.opt.zero_grad()
            self.penalised(batch).backward(inputs=list(self.model.parameters()))
            self.opt.step()
        slope = torch.autograd.grad(self.loss(outer), list(self.model.parameters()))
        lower = types.SimpleNamespace(
            paths=[], cur_batch=batches[-1], training_step_exec=self.penalised,
            trainable_parameters=lambda: list(self.model.parameters()),
            config=types.SimpleNamespace(neumann_iterations=TERMS - 1, neumann_alpha=SCALE),
        )  # fmt: skip
        upper = types.SimpleNamespace(trainable_parameters=lambda: [self.decay])
        return {"weight_decay": neumann(slope, lower, upper)[0]}


class Gdtuo(Peer):
    """gradient-descent-the-ultimate-optimizer: the last step's learning rate, at every step."""

    like = "OneStep"

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(net, dtype)
        from gradient_descent_the_ultimate_optimizer import gdtuo

        self.rule = gdtuo.SGD(LR, mu=MOMENTUM)
        self.wrapper = gdtuo.ModuleWrapper(self.model, optimizer=self.rule)
        self.wrapper.initialize()

    def cycle(self, batches: list[Batch], outer: Batch) -> dict[str, Tensor]:
        """Steps as its documentation shows them; the last gradient is taken on ``outer``."""
        for batch in [*batches, outer]:
            self.wrapper.begin()
            loss = self.net.loss(self.wrapper.forward(batch[0]), batch[1])
            self.wrapper.zero_grad()
            loss.backward(create_graph=False)
            self.wrapper.step()
        return {"lr": self.rule.parameters["alpha"].grad}


PEERS: dict[str, type[Peer]] = {
    "higher": Higher,
    "torchopt": TorchOpt,
    "betty-ml": Betty,
    "gradient-descent-the-ultimate-optimizer": Gdtuo,
}
