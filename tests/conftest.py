"""For every test that uses torch: one thread, so that sums are made in one order, and one seed. No network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

pytest_plugins = ["command_line", "headless_browser"]
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same numbers in every run of a test; a benchmark keeps all the threads."""
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("benchmark"):
        yield
        return
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
