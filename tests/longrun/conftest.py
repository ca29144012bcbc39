"""Everything here takes minutes and runs only when asked for: `python -m pytest -m longrun`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.longrun.table import Fault, Row, keep, markdown, row


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "longrun" in item.path.parts:
            item.add_marker(pytest.mark.longrun)


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Fault]:
    """Takes the rows of a test: fault, where, runs, lost, result. They count whatever follows."""
    rows: list[Row] = []
    yield lambda *columns: rows.append(row(*columns))
    file = request.config.getoption("--faults")
    if rows and file is not None:
        keep(file, rows)
    sys.stdout.write(markdown(rows))
