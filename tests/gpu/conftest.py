"""Kernels on a GPU: `make test-gpu`, or `python -m pytest tests/gpu`. The main suite does not collect this folder.

LLAVA_FAST_DRY_RUN=1 runs the same tests on the CPU with the reference in the kernels' place, at small shapes: a check of the tests.
"""

from __future__ import annotations

import os

import pytest
import torch

DRY_RUN = os.environ.get("LLAVA_FAST_DRY_RUN") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not DRY_RUN and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="torch.cuda is not available"))


@pytest.fixture(scope="session")
def machine() -> tuple[str, str]:
    """Device, and the implementation that is checked."""
    return ("cpu", "reference") if DRY_RUN else ("cuda", "triton")
