"""Warnings of frameworks about themselves, which say nothing about these tests."""

import pytest

QUIET = [
    # torch and frameworks about each other
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # Lightning: advice for real runs
    "ignore:The .*dataloader.* does not have many workers",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:GPU available but not used",
    "ignore:.*treespec",
    # HF Trainer
    "ignore:'pin_memory' argument is set as true but no accelerator is found",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/integrations" in item.path.as_posix():
            for text in QUIET:
                item.add_marker(pytest.mark.filterwarnings(text))
