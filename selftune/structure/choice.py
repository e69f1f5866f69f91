"""A choice between modules: a weighted sum during training, a single module at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from selftune._arguments import COUNT, MODULE, MODULES, NONE, Number, checked
from selftune.monitor import Monitor
from selftune.structure._saliency import Closure, buffers_kept, loss_of
from selftune.structure.gates import apart

log = logging.getLogger("selftune")

SURE = 100.0
"""Score of the chosen branch; the others get −SURE, so softmax is exactly 1 and 0."""


class Choice(nn.Module):
    """``y = Σ_k softmax(s)_k branch_k(x)``, to select kernel sizes, activations or norms.

    Weights start equal. :class:`Chooser` tunes the scores s on validation data; they are
    hyperparameters, not parameters. :func:`prune` keeps the branch with the largest weight.

    Args:
        branches: Modules with outputs of the same shape.

    Attributes:
        scores: s, shape (branches,), a buffer.

    Raises:
        ValueError: Fewer than two branches; outputs of different shapes; a branch that changes its
            input in place.

    Examples:
        >>> choice = Choice([nn.ReLU(), nn.Identity()])
        >>> choice(torch.tensor([-2.0, 2.0])).tolist()
        [-1.0, 2.0]

    Source: Liu et al. 2019 (DARTS), eq. 2.
    """

    scores: Tensor

    @checked(branches=MODULES)
    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(branches) < 2:
            raise ValueError(f"len(branches)={len(branches)} must be at least 2")
        self.branches = nn.ModuleList(branches)
        self.register_buffer("scores", torch.zeros(len(branches)))

    def weights(self) -> Tensor:
        """softmax(s), shape (branches,)."""
        return torch.softmax(self.scores, 0)

    def forward(self, input: Tensor) -> Tensor:
        """The weighted sum."""
        outputs = [
            apart(f"Choice: branches[{i}]", branch, input) for i, branch in enumerate(self.branches)
        ]
        return mixed(outputs, self.weights())

    @property
    def chosen(self) -> nn.Module:
        """The branch with the largest weight."""
        return self.branches[int(self.scores.argmax())]

    def extra_repr(self) -> str:
        """The weights."""
        return "weights=" + ", ".join(f"{w:.2f}" for w in self.weights().tolist())


@fx.wrap  # one node of a graph, as the shapes are compared
def mixed(outputs: list[Tensor], weights: Tensor) -> Tensor:
    """Σ_k weights_k · outputs_k."""
    shapes = [tuple(o.shape) for o in outputs]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"Choice: branches have outputs of shapes {', '.join(map(str, shapes))}; make them "
            "equal, for example by padding"
        )
    return sum(w * o for w, o in zip(weights, outputs, strict=True))


def choices(model: nn.Module) -> Iterator[tuple[str, Choice]]:
    """Names and choices of a model; a shared choice is listed once."""
    for name, module in model.named_modules():
        if isinstance(module, Choice):
            yield name, module


class Chooser:
    """Tunes the scores of all choices in a model on validation data, by gradient.

    From 10 % of the run on, takes an Adam step on the scores with ``∂L_val/∂s`` at the current
    weights, once every ``every`` training steps. From 40 % on, the largest score is raised so that
    its weight stays above a bound that rises to 1. At 80 % the choice is made: one branch has
    weight 1, and the rest of the run trains only that branch.

    Args:
        model: A model that contains :class:`Choice` modules.
        total_steps: Number of steps in the run; not needed with the tuner's callback.
        every: Training steps between updates of the scores; by default ``total_steps // 60``. The
            callback does not use it: it updates them after each evaluation.
        rate: Learning rate of Adam for the scores.
        recorder: Where weights are logged as ``structure/choice/…``.

    Raises:
        ValueError: The model has no choices, ``total_steps`` is below 1, no update of the scores is
            due in the last fifth of the run, or the loss does not depend on the choices.

    Examples:
        >>> net = nn.Sequential(Choice([nn.ReLU(), nn.Tanh()]), nn.Linear(3, 1))
        >>> chooser, x = Chooser(net, total_steps=60), torch.randn(8, 3)
        >>> for step in range(60):  # after opt.step()
        ...     moved = chooser.step(lambda: net(x).square().mean())
        >>> round(float(net[0].weights().max()), 1)
        1.0

    Source: first-order DARTS, Liu et al. 2019; annealing as for the temperature in Xie et al. 2019
    (SNAS).
    """

    start, sharpen, end = 0.1, 0.4, 0.8

    @checked(model=MODULE, total_steps=COUNT | NONE, every=COUNT | NONE, rate=Number(above=0))
    def __init__(
        self, model: nn.Module, total_steps: int | None = None, *, every: int | None = None,
        rate: float = 0.2, recorder: Any = None,
    ) -> None:  # fmt: skip
        total = total_steps or 0
        by_name = dict(choices(model))
        if not by_name:
            raise ValueError("model has no choices: put selftune.structure.Choice into it")
        self._model, self._choices, self._total = model, by_name, total
        self._every = max(1, total // 60) if every is None else every
        if total // self._every * self._every < self.end * total:
            most = max(1, total - math.ceil(self.end * total))
            raise ValueError(
                f"every={every}: no step of the scores is in the last fifth of {total} "
                f"steps, where the choice is made; pass at most {most}"
            )
        self._adam = self._optimizer(rate)
        self._taken = 0
        self._monitor = Monitor(recorder)

    @property
    def made(self) -> bool:
        """Whether each choice is made: one of its weights is 1."""
        return all(float(c.weights().max()) == 1 for c in self._choices.values())

    def step(self, closure: Closure) -> bool:
        """Update the scores if an update is due; call after each ``opt.step()``.

        Returns whether they were updated. A step whose gradient is not finite is skipped. When the
        choice is made, call ``opt.sync(weights=False)``, so that the guard does not mistake units
        of the other branches for dead ones.

        Args:
            closure: Returns the validation loss, as for ``opt.hyper_step``.

        Raises:
            ValueError: ``total_steps`` is missing, or the loss does not depend on the choices.
        """
        if not self._total:
            raise ValueError("total_steps=None: pass the number of steps in the run to Chooser")
        self._taken += 1
        return self._taken % self._every == 0 and self._update(closure, self._taken / self._total)

    def callback(self, closure: Closure) -> Callable[[Any], bool]:
        """A callback for the tuner, ``fit(callbacks=[...])``: updates the scores after evaluations.

        Each update is that of :meth:`step`, at the averaged weights. The choice is made at the
        first evaluation at or after 80 % of the run.

        Checkpoints of the tuner contain the scores, but not :meth:`state_dict`.

        Args:
            closure: Returns a validation loss of the model.
        """

        def choosing(progress: Any) -> bool:
            self._taken = progress.step
            if not self.made:
                self._update(closure, progress.step / progress.total)
                if self.made and progress.step == progress.total:
                    log.warning(
                        "choice: made after the last of %d steps, so the chosen branches were not "
                        "trained alone: evaluate more often, for example evaluate_every=%d",
                        progress.total, max(1, progress.total // 60),
                    )  # fmt: skip
            return False

        return choosing

    def _optimizer(self, rate: float) -> torch.optim.Adam:
        scores = [c.scores for c in self._choices.values()]
        return torch.optim.Adam(scores, lr=rate, betas=(0.5, 0.9))

    def _follow(self, scores: Sequence[Tensor]) -> None:
        """Continue with the scores of a model that was moved to another device or dtype."""
        known = self._adam.param_groups[0]["params"]
        if any(a is not b for a, b in zip(known, scores, strict=True)):
            state = self._adam.state_dict()
            self._adam = self._optimizer(state["param_groups"][0]["lr"])
            self._adam.load_state_dict(state)

    def _update(self, closure: Closure, done: float) -> bool:
        """Update the scores, unless it is too early or the choice is made."""
        if done < self.start or self.made:
            return False
        scores = [c.scores for c in self._choices.values()]
        with buffers_kept(self._model), torch.enable_grad():
            for score in scores:
                score.requires_grad_()
            try:
                loss = loss_of(closure)
                grads = torch.autograd.grad(loss, scores, allow_unused=True)
            finally:
                for score in scores:
                    score.requires_grad_(False)
        missed = [n for n, g in zip(self._choices, grads, strict=True) if g is None]
        if missed:
            raise ValueError(
                "closure: its loss does not depend on the choices "
                f"{', '.join(map(repr, missed))}: it must run the model that the chooser was made "
                "for"
            )
        # A NaN in Adam's moments would stay there.
        finite = all(bool(torch.isfinite(g).all()) for g in grads)
        if finite:
            self._follow(scores)
            for score, grad in zip(scores, grads, strict=True):
                score.grad = grad
            self._adam.step()
            self._adam.zero_grad()
        else:
            log.warning(
                "choice: gradient of the scores is not finite; step %d skipped", self._taken
            )
        with torch.no_grad():
            self._sharpen(done)
        self._log()
        return finite

    def _sharpen(self, done: float) -> None:
        """Raise the largest score if its weight is below the scheduled bound."""
        share = min(1.0, (done - self.sharpen) / (self.end - self.sharpen))
        for choice in self._choices.values():
            scores, first = choice.scores, int(choice.scores.argmax())
            if share >= 1:
                scores.fill_(-SURE)[first] = SURE
            least = (1 + share * (len(scores) - 1)) / len(scores)
            if 0 < share < 1 and float(choice.weights()[first]) < least:
                # w = e^s / (e^s + e^r), with e^r the sum over the others; solved for s
                rest = torch.cat([scores[:first], scores[first + 1 :]]).logsumexp(0)
                scores[first] = rest + math.log(least / (1 - least))

    def _log(self) -> None:
        if self._monitor.on:
            rows = [
                (f"structure/choice/{name}/{i}", float(w))
                for name, choice in self._choices.items() for i, w in enumerate(choice.weights())
            ]  # fmt: skip
            self._monitor.scalars(rows, self._taken)
            self._monitor.flush()

    def state_dict(self) -> dict[str, Any]:
        """State of Adam and the step counter; the scores are in the model's state dict."""
        return {"adam": self._adam.state_dict(), "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._adam.load_state_dict(state["adam"])
        self._taken = int(state["taken"])


def choose(
    model: nn.Module, loss: Callable[[nn.Module], Any] | None, tolerance: float
) -> nn.Module:  # fmt: skip
    """Replace choices by their branches with the largest weight, in place.

    Args:
        model: A model in evaluation mode.
        loss: Returns the loss of a model, compared before and after.
        tolerance: Maximum relative increase of the loss.

    Raises:
        ValueError: No loss is given.
        RuntimeError: The loss increases by more.
    """
    chosen = dict(choices(model))
    if not chosen:
        return model
    if loss is None:
        raise ValueError(
            f"loss=None: {', '.join(map(repr, chosen))} become one branch each, which changes "
            "outputs; pass loss=, a function of the model, to compare before and after"
        )
    weights = {n: [round(w, 3) for w in c.weights().tolist()] for n, c in chosen.items()}
    before = float(loss(model))
    for path, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(module, Choice) and path:
            model.set_submodule(path, module.chosen)
    model = model.chosen if isinstance(model, Choice) else model
    after = float(loss(model))
    log.info("choices %s: loss %.4g before, %.4g after", weights, before, after)
    if not after <= before + tolerance * abs(before):
        raise RuntimeError(
            f"with one branch for each choice the loss rises from {before:.4g} to {after:.4g}, "
            f"above tolerance={tolerance}; weights were {weights}: tune them for longer (Chooser), "
            "or raise the tolerance"
        )
    return model
