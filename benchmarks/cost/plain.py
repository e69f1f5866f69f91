"""Plain training steps of torch: the baselines that a fused step is held against.

``eager`` is the ordinary loop. The others are the usual ways to compile it, of which the fastest
counts: the model with its loss, that and the optimizer's step, and the whole step as one function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from benchmarks.cost.nets import Batch, Net

Step = Callable[[Batch], None]
OPTIONS = {
    "SGD": dict(lr=0.01, momentum=0.9, weight_decay=1e-4),
    "AdamW": dict(lr=1e-3, weight_decay=1e-2),
}


def steps(net: Net, rule: str, device: str = "cpu") -> dict[str, Step]:
    """All baselines by name, each on a model of its own."""
    return {
        "eager": _loop(net, rule, device, compile_model=False, compile_step=False),
        "model compiled": _loop(net, rule, device, compile_model=True, compile_step=False),
        "model and optimizer compiled": _loop(net, rule, device, compile_model=True,
                                              compile_step=True),
        "whole step compiled": _whole(net, rule, device),
        "whole step compiled, launched from C++": _whole(net, rule, device, cpp_wrapper=True),
    }  # fmt: skip


def _loop(net: Net, rule: str, device: str, *, compile_model: bool, compile_step: bool) -> Step:
    torch.manual_seed(0)
    model = net.make().to(device)
    opt = getattr(torch.optim, rule)(model.parameters(), **OPTIONS[rule])

    def objective(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(model(x), y)

    loss_of = torch.compile(objective) if compile_model else objective
    update = torch.compile(opt.step) if compile_step else opt.step

    def step(batch: Batch) -> None:
        opt.zero_grad()
        loss_of(*batch).backward()
        update()

    return step


def _whole(net: Net, rule: str, device: str, *, cpp_wrapper: bool = False) -> Step:
    torch.manual_seed(0)
    model = net.make().to(device)
    names = [n for n, _ in model.named_parameters()]
    params = [p.detach() for p in model.parameters()]
    buffers = dict(model.named_buffers())
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    taken = torch.zeros(1, device=device)

    def gradients(batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        def objective(params: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            held = {n: b.clone() for n, b in buffers.items()}
            tensors = dict(zip(names, params, strict=True)) | held
            return net.loss(functional_call(model, tensors, (batch[0],)), batch[1]), held

        grads, (_, held) = grad_and_value(objective, has_aux=True)(params)
        return grads, held

    def descend(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        if rule == "SGD":
            m.copy_(0.9 * m + g + 1e-4 * p)
            p.sub_(0.01 * m)
            return
        m.copy_(torch.lerp(m, g, 0.1))
        v.copy_(torch.lerp(v, g * g, 0.001))
        root = (v / (1 - 0.999**taken)).sqrt() + 1e-8
        p.copy_((1 - 1e-5) * p - 1e-3 * m / (1 - 0.9**taken) / root)

    @torch.no_grad()
    def step(batch: Batch) -> None:
        taken.add_(1)
        grads, held = gradients(batch)
        for buffer, new in zip(buffers.values(), held.values(), strict=True):
            buffer.copy_(new)
        for each in zip(params, grads, first, second, strict=True):
            descend(*each)

    if device != "cpu":
        return torch.compile(step, mode="reduce-overhead")
    return torch.compile(step, options={"cpp_wrapper": cpp_wrapper})


def memory(net: Net, rule: str) -> int:
    """Bytes of parameters, buffers and the optimizer's state after a step."""
    model = net.make()
    opt = getattr(torch.optim, rule)(model.parameters(), **OPTIONS[rule])
    net.loss(model(net.batches[0][0]), net.batches[0][1]).backward()
    opt.step()
    state = [t for entry in opt.state.values() for t in entry.values()]
    tensors = [t for t in [*state, *model.parameters(), *model.buffers()] if t.ndim]
    return sum(t.numel() * t.element_size() for t in tensors)
