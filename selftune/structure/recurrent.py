"""LSTM and GRU with a gate for each hidden unit."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from selftune._arguments import Instance, checked
from selftune.structure.gates import AbstractGated

LSTM_OR_GRU = Instance((nn.LSTM, nn.GRU), "a torch.nn.LSTM or GRU")


class Recurrent(AbstractGated):
    """``h ← g · cell(x, h)``: a gate for each hidden unit of a single-layer LSTM or GRU.

    The gated state is both the output and the input of the cell's products at the next step (a
    GRU's own memory, z · h, is not gated), so a closed unit has no effect, and :func:`prune`
    removes its rows and columns from all weights.

    Args:
        cell: ``nn.LSTM`` or ``nn.GRU``; it becomes a submodule and is not copied. The initial
            state is 0.

    Raises:
        ValueError: The cell has several layers (use :class:`RecurrentLayers`), is
            bidirectional, or has a projection.

    Examples:
        >>> cell = nn.LSTM(3, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 3)
        >>> bool(torch.allclose(Recurrent(cell)(x)[0], cell(x)[0]))
        True
    """

    @checked(cell=LSTM_OR_GRU)
    def __init__(self, cell: nn.LSTM | nn.GRU) -> None:
        super().__init__(cell.hidden_size, batch_dim=0 if cell.batch_first else 1)
        _check_options(cell, num_layers=1, bidirectional=False, proj_size=0)
        self.cell = cell
        some = next(cell.parameters())
        self.to(some.device, some.dtype)

    def forward(self, input: Tensor, hx: None = None) -> tuple[Tensor, Any]:
        """Return outputs and final state like the cell, with ``h`` gated.

        Args:
            input: Shape (batch, length, features) if ``batch_first``, else (length, batch,
                features).
            hx: None, because the initial state is 0.

        Raises:
            ValueError: The input is packed, has no batch dimension or another number of features,
                or ``hx`` is given.
        """
        check_input(input, hx)
        cell: Any = self.cell
        if input.shape[-1] != cell.input_size:  # torch.lstm reads beyond the weights
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {input.shape[-1]} features, and the cell "
                f"input_size={cell.input_size}"
            )
        gates = self.factors()
        weights = [cell.weight_ih_l0, cell.weight_hh_l0 * gates]
        if cell.bias:
            weights += [cell.bias_ih_l0, cell.bias_hh_l0]
        batch = input.shape[0 if cell.batch_first else 1]
        start = input.new_zeros(1, batch, len(gates))
        run = (cell.bias, 1, 0.0, self.training, False, cell.batch_first)
        if isinstance(cell, nn.LSTM):
            output, h, c = torch.lstm(input, (start, start), weights, *run)
            gates = gates.to(output.dtype)  # that of autocast
            return output * gates, (h * gates, c)
        output, h = torch.gru(input, start, weights, *run)
        gates = gates.to(output.dtype)
        return output * gates, h * gates

    def passed(self, input: Tensor, output: Any) -> None:
        """None, because the gates also act inside the recurrence."""

    def per_unit(self, values: Tensor) -> Tensor:
        """Return the values unchanged."""
        return values

    def plain(self) -> nn.Module:
        """An equivalent of torch modules only; modifies and reuses the cell."""
        gates = self.factors().detach()
        with torch.no_grad():
            self.cell.get_parameter("weight_hh_l0").mul_(gates)
        self.cell.flatten_parameters()
        if bool((gates == 1).all()):
            return self.cell
        root = nn.Module()
        root.add_module("cell", self.cell)
        root.register_buffer("factors", gates.clone())
        graph = fx.Graph()
        both = graph.call_module("cell", (graph.placeholder("input"),))
        factors = graph.get_attr("factors")
        output, state = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        factors = graph.call_method("type_as", (factors, output))
        output = graph.call_function(operator.mul, (output, factors))
        if isinstance(self.cell, nn.LSTM):
            h, c = (graph.call_function(operator.getitem, (state, i)) for i in range(2))
            graph.output((output, (graph.call_function(operator.mul, (h, factors)), c)))
        else:
            graph.output((output, graph.call_function(operator.mul, (state, factors))))
        return fx.GraphModule(root, graph, "Scaled")


def check_input(input: Any, hx: Any) -> None:
    """Raise an error for what a gated layer does not take."""
    if hx is not None:
        raise ValueError("hx: a gated LSTM or GRU starts from a state of 0: pass the input alone")
    if not isinstance(input, Tensor):
        raise ValueError(
            f"input is a {type(input).__name__}: a gated LSTM or GRU takes padded sequences; pass "
            "pad_packed_sequence(input)[0]"
        )
    if input.ndim != 3:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has no batch dimension: pass input[None] with "
            "batch_first=True, else input[:, None]"
        )


def _check_options(rnn: nn.LSTM | nn.GRU, **usual: int) -> None:
    for name, value in usual.items():
        if getattr(rnn, name) != value:
            raise ValueError(
                f"nn.{type(rnn).__name__}({name}={getattr(rnn, name)}) cannot be gated: {name} "
                f"must be {value}"
            )


class RecurrentLayers(nn.Module):
    """A multi-layer LSTM or GRU in which each layer is a :class:`Recurrent`.

    Args:
        rnn: The layer from which weights and sizes are copied.

    Raises:
        ValueError: The layer is bidirectional or has a projection.
    """

    @checked(rnn=LSTM_OR_GRU)
    def __init__(self, rnn: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        layers = [Recurrent(one_layer(rnn, i)) for i in range(rnn.num_layers)]
        self.layers, self.dropout = nn.ModuleList(layers), nn.Dropout(rnn.dropout)
        self._lstm, self._last = isinstance(rnn, nn.LSTM), rnn.num_layers - 1

    def forward(self, input: Tensor, hx: None = None) -> tuple[Tensor, Any]:
        """Return the outputs of the last layer and lists of each layer's final states.

        States have shape (batch, units): ``h[-1]`` is that of the last layer, as in torch.
        """
        if hx is not None and not isinstance(hx, fx.Proxy):  # as when pruning traces the layers
            check_input(input, hx)
        states = []
        for i, layer in enumerate(self.layers):
            input, state = layer(input)
            states.append(state)
            if i < self._last:
                input = self.dropout(input)
        if self._lstm:
            return input, ([h[0] for h, _ in states], [c[0] for _, c in states])
        return input, [h[0] for h in states]


def one_layer(rnn: nn.LSTM | nn.GRU, at: int) -> Any:
    """One layer, with copies of its weights."""
    _check_options(rnn, bidirectional=False, proj_size=0)
    weight = getattr(rnn, f"weight_ih_l{at}")
    cell = type(rnn)(
        weight.shape[1], rnn.hidden_size, 1, rnn.bias, rnn.batch_first, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        for name, param in cell.named_parameters():
            source = getattr(rnn, name.replace("_l0", f"_l{at}"))
            param.copy_(source)
            param.requires_grad_(source.requires_grad)
    return cell
