"""`mlx_sora download` from the outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_sora.cli import download as command
from mlx_sora.cli.main import main
from mlx_sora.loading.model_folder import PUBLISHED
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.sources import ENDPOINT_VARIABLE
from tests.helpers.hub_server import FakeHub, Repo
from tests.helpers.published import STDIT, VAE, repositories
from tests.hub.conftest import CHUNK

#: The command, with pieces so small that a tiny file comes in several.
PROGRAM = f"""
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
from mlx_sora.cli.main import main
sys.exit(main())
"""


@pytest.fixture
def endpoint(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENDPOINT_VARIABLE, hub.endpoint)
    return hub.endpoint


def test_the_name_is_that_of_the_model() -> None:
    assert command.MODEL == PUBLISHED


def test_progress_per_file_and_the_path_last(
    endpoint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", PUBLISHED]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{root / PUBLISHED}\n"
    for words in ("fetch transformer/model.safetensors", "fetch tokenizer/spiece.model", "100%"):
        assert words in captured.err
    assert "4 MB fetched, everything verified" in captured.err
    assert main(["download", PUBLISHED]) == 0
    assert capsys.readouterr().err == "already here\n"
    assert main(["download", PUBLISHED, "--check"]) == 0
    captured = capsys.readouterr()
    assert "check transformer/model.safetensors" in captured.err
    assert "all checksums are right" in captured.err


def test_quiet(endpoint: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{root / PUBLISHED}\n", "")


def test_flags_come_before_the_environment(
    hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = repositories()
    hub.repos["someone/vae"] = Repo({}, {"v1": files[VAE]})
    monkeypatch.setenv(ENDPOINT_VARIABLE, "http://127.0.0.1:9")
    monkeypatch.setenv("MLX_SORA_SOURCE_VAE", "someone/vae")
    words = ["download", PUBLISHED, "--endpoint", hub.endpoint, "--source", "vae=@v1", "--quiet"]
    assert main(words) == 0
    assert hub.asked("GET", "/api/models/someone/vae/revision/v1")
    assert not hub.asked("GET", VAE)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "MODEL"),
        (["shapes"], 2, "cannot be downloaded"),
        (["opensora"], 2, PUBLISHED),
        ([PUBLISHED, "--source", "t5=a/b"], 2, "text_encoder"),
        ([PUBLISHED, "--endpoint", "ftp://x"], 2, "http"),
        ([PUBLISHED, "--source", "vae=no/such"], 4, "no/such"),
    ],
)
def test_mistakes_are_one_line(
    endpoint: str,
    root: Path,
    words: list[str],
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["download", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_generate_does_not_download(
    endpoint: str, hub: FakeHub, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "a", "--model", PUBLISHED]) == 4
    assert f"python -m mlx_sora download {PUBLISHED}" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_ended_process_is_continued(
    endpoint: str, hub: FakeHub, root: Path, number: signal.Signals
) -> None:
    content = repositories()[STDIT]["model.safetensors"]
    hub.faults.stalls["model.safetensors"] = 10 * CHUNK + 5
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "download", PUBLISHED],
        env={**os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while sum(part.stat().st_size for part in root.rglob("model.safetensors.*")) < 10 * CHUNK:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        threading.Event().wait(0.05)  # time.sleep does nothing in these tests
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    hub.resume()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "the same command continues" in errors
        assert "Traceback" not in errors
    assert [path.name for path in root.iterdir()] == [STAGING]
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    assert (root / PUBLISHED / "transformer/model.safetensors").read_bytes() == content
    assert hub.asked("GET", f"/cdn/{STDIT}")[-1].headers["Range"] == f"bytes={10 * CHUNK}-"
