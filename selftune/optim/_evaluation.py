"""Evaluation at the averaged weights: within a block, or until training continues."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from selftune.optim._container import Container
from selftune.optim._outer import OuterLoss
from selftune.optim._shown import Shown

log = logging.getLogger("selftune")


class EvaluationMode(Container):
    """Exchanges training weights and averaged weights in the model."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate and save at the averaged weights, with their BatchNorm statistics.

        At the end of a run of known length these are the final weights: the position between the
        last good weights, the average and the last iterate with the lowest validation loss,
        estimated from its slopes. ``state_dict()`` in the block also contains the training weights;
        loading it restores them.

        Raises:
            RuntimeError: The weights were changed in the block, for example by the model's
                ``load_state_dict``; the training weights have been restored.

        Examples:
            >>> import selftune as st
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = st.SGD(net, lr=0.1)
            >>> with opt.averaged():
            ...     output = net(torch.ones(1, 2))
        """
        if self._engine.buffers.shown:  # after eval(), or inside a closure of hyper_step
            yield
            return
        self.eval()
        try:
            yield
        finally:
            changed = self._leave()
        if changed:
            self._refuse_changes("averaged()")

    def eval(self) -> None:
        """Put the averaged weights into the model, as in :meth:`averaged`, until ``train()``.

        A second call does nothing.

        Raises:
            RuntimeError: Called inside the closure of ``hyper_step``.

        Examples:
            >>> import selftune as st
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = st.SGD(net, lr=0.1)
            >>> opt.eval()
            >>> output = net(torch.ones(1, 2))
            >>> opt.train()
        """
        engine = self._engine
        if engine.shown is not None:
            return
        self._restore()
        self._outside("eval()")
        with torch.no_grad():
            self._blocks()
        if engine.buffers.waiting:
            log.warning(
                "%s: averaged() before the first training pass of a loaded run: BatchNorm layers "
                "are not found yet and keep the training weights' statistics. Pass the model: "
                "st.SGD(model, ...), or model=",
                engine.controller.label,
            )
        end = OuterLoss(engine).final_position
        with torch.no_grad(), engine.masks_applied():
            engine.shown = Shown(engine.blocks, engine.buffers, end, live=end == 0)

    def train(self) -> None:
        """Restore the training weights after ``eval()``, or after loading a state saved then.

        A second call does nothing.

        Raises:
            RuntimeError: The weights were changed after ``eval()``; the training weights have
                been restored.
        """
        self._restore()
        if self._leave():
            self._refuse_changes("eval()")

    def _restore(self) -> None:
        """Restore loaded training weights if the model's state was loaded after them."""
        restored, self._engine.restored = self._engine.restored, None
        if restored is not None and restored.changed:
            restored.put()

    def _leave(self) -> bool:
        """Restore the training weights; return whether the other weights were changed."""
        shown, self._engine.shown = self._engine.shown, None
        if shown is None:
            return False
        changed = shown.changed
        shown.back()
        return changed

    def _refuse_changes(self, where: str) -> None:
        raise RuntimeError(
            f"weights were changed after {where} had put averaged weights in place; the change "
            "is lost, and the training weights are restored. Load a model's state while the "
            "training weights are in place; create embeddings, which write in a forward pass if "
            "they have a max_norm, with max_norm=None"
        )

    def _outside(self, what: str) -> None:
        restored = self._engine.restored
        if restored is not None and restored.changed:
            raise RuntimeError(
                f"{what} at averaged weights: the model's state was loaded after the optimizer's, "
                "which contains the training weights; call train() first to restore them"
            )
        self._engine.restored = None
        if self._engine.buffers.shown:
            raise RuntimeError(
                f"{what} inside averaged() or after eval() would be lost: leave the block or call "
                "train() first"
            )
