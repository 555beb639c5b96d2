"""Coverage is that of tests and docstrings: laws run the same lines some hundred times, which tracing would double."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("no_cover")
