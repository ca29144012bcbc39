"""A local hub with the published repositories, an empty folder of models, and no other network."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.loading.model_folder import WEIGHTS_VARIABLE
from mlx_sora.manage.download import DownloadResult, download
from mlx_sora.manage.hub import Hub
from mlx_sora.manage.progress import ProgressCallback, ignore_progress
from mlx_sora.manage.sources import ENDPOINT_VARIABLE, choose_endpoint, choose_sources
from tests.helpers.hub_server import FakeHub, serve
from tests.helpers.published import repos

#: Small, so that the tiny files come in several pieces.
CHUNK = 1 << 14

Get = Callable[..., DownloadResult]


@pytest.fixture(autouse=True)
def only_localhost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every host but 127.0.0.1, and fail the test that asked for one, caught or not."""
    hosts: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def note(host: Any) -> None:
        hosts.append(str(host))
        assert host == "127.0.0.1", f"{host} is not this machine"

    def checked_connect(self: socket.socket, address: Any) -> None:
        note(address[0])
        connect(self, address)

    def checked_look_up(host: Any, *more: Any, **options: Any) -> Any:
        note(host)
        return look_up(host, *more, **options)

    monkeypatch.setattr(socket.socket, "connect", checked_connect)
    monkeypatch.setattr(socket, "getaddrinfo", checked_look_up)
    yield
    assert set(hosts) <= {"127.0.0.1"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, no proxy, no waiting."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", ENDPOINT_VARIABLE, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A server with the published repositories."""
    with serve(repos()) as server:
        yield server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models, empty."""
    folder = tmp_path / "weights"
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(folder))
    return folder


@pytest.fixture
def get(hub: FakeHub, root: Path) -> Get:
    """Download into `root` from the local hub; keywords: check, on_progress."""

    def run(
        *sources: str, check: bool = False, on_progress: ProgressCallback = ignore_progress
    ) -> DownloadResult:
        chosen = choose_sources(sources, environment={})
        server = Hub(choose_endpoint(hub.endpoint, {}))
        return download(root, chosen, server, on_progress, check=check)

    return run
