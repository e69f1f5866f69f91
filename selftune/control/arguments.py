"""Arguments that both drivers have in common."""

from __future__ import annotations

from selftune._arguments import FLAG, NONE, Instance, Kind, OneOf, That, Whole
from selftune.control.lr_sweep import SweepSettings

ARGUMENTS: dict[str, Kind] = {
    "probe": FLAG | Whole(least=2, most=10_000) | OneOf((0,))
    | Instance((SweepSettings,), "an st.control.SweepSettings"),
    "guard": NONE | FLAG | That(
        lambda g: not isinstance(g, type) and hasattr(g, "begin"),
        "a policy, such as st.control.GuardPolicy(patience=5)",
    ),
}  # fmt: skip
"""Valid values of the common arguments of both drivers."""
