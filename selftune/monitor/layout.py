"""Pages of TensorBoard's Custom Scalars: losses, health, and a page for each family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selftune.hparams import FAMILIES

STRENGTHS = "Strengths"


def family(name: str) -> str:
    """The page of a hyperparameter."""
    return next((page for page, names in FAMILIES.items() if name in names), STRENGTHS)


def layout(tuned: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """What ``SummaryWriter.add_custom_scalars`` takes.

    Args:
        tuned: Names of the tuned hyperparameters.
    """
    pages: dict[str, dict[str, list[Any]]] = {
        "Loss": {
            "train against validation": ["Multiline", ["train/loss", "val/loss"]],
            "gap": ["Multiline", ["gap/val-train"]],
            "averaged against last weights": ["Multiline", ["outer/averaged-vs-last"]],
        }
    }
    for name in tuned:
        margin = ["Margin", [f"hyper/{name}", f"margin/{name}/low", f"margin/{name}/high"]]
        pages.setdefault(family(name), {})[name] = margin
    pages["Health"] = {
        "signal-to-noise ratios": ["Multiline", [f"hypergrad/{n}/snr" for n in tuned]],
        "verdicts": ["Multiline", [f"verdict/{n}" for n in tuned]],
        "share of time spent tuning": ["Multiline", ["cost/overhead"]],
        "predicted against realised change": ["Multiline", ["response/.*"]],
        "roll-backs": ["Multiline", ["guard/events"]],
    }
    return pages
