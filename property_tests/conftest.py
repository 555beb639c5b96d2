"""Coverage is that of tests and controls: on random runs tracing takes as long as the law, and sees the same lines."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    if hasattr(getattr(item, "obj", None), "hypothesis"):
        item.add_marker("no_cover")
