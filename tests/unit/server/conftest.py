"""A server over a queue without processes, and the client of the video API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.helpers.fake_queue import FakeQueue
from tests.helpers.web import Web, serving


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeQueue, Web]]:
    """One server for all tests, whose queue each of them empties."""
    queue = FakeQueue(tmp_path_factory.mktemp("server"))
    with serving(queue) as web:
        yield queue, web


@pytest.fixture
def queue(served: tuple[FakeQueue, Web], tmp_path: Path) -> FakeQueue:
    served[0].__init__(tmp_path)
    return served[0]


@pytest.fixture
def web(served: tuple[FakeQueue, Web], queue: FakeQueue) -> Web:
    return served[1]


@pytest.fixture
def client(web: Web) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{web.url}/v1", api_key="none", max_retries=0) as client:
        yield client
