"""Warnings of frameworks about themselves, which say nothing about these tests."""

import pytest

pytest.register_assert_rewrite("matrix_checks", "optimizer_checks")

QUIET = [
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",  # Lightning 2.6
    "ignore:Checkpoint directory .* exists and is not empty",  # Lightning, resuming there
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/integrations" in item.path.as_posix():
            for text in QUIET:
                item.add_marker(pytest.mark.filterwarnings(text))
