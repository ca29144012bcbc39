"""Downloads that cannot succeed: each says why in one line and leaves no model behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import PUBLISHED, WEIGHTS_VARIABLE
from mlx_sora.manage.download import STAGING, download
from mlx_sora.manage.hub import ATTEMPTS, Hub
from mlx_sora.manage.progress import FileProgress
from mlx_sora.manage.sources import choose_sources
from mlx_sora.manage.staging import MARGIN
from tests.helpers.hub_server import FakeHub, Repo
from tests.helpers.published import PIXART, STDIT, VAE, repositories
from tests.hub.conftest import CHUNK, Get

LARGE = "transformer/model.safetensors"


@pytest.fixture
def refused(get: Get, root: Path) -> Any:
    """Download, which must fail: the message. Nothing may look like a model afterwards."""

    def run(*sources: str, **more: Any) -> str:
        with pytest.raises(WeightsError) as error:
            get(*sources, **more)
        assert not (root / PUBLISHED).exists()
        assert "\n" not in str(error.value)
        assert error.value.fix
        return str(error.value)

    return run


def content() -> bytes:
    return repositories()[STDIT]["model.safetensors"]


def test_wrong_checksum(refused: Any, hub: FakeHub, get: Get, root: Path) -> None:
    wrong = bytes(reversed(content()))
    hub.faults.content["model.safetensors"] = wrong
    message = refused()
    for words in ("model.safetensors", STDIT, "the checksum"):
        assert words in message
    assert not list((root / STAGING).rglob("*.part")), "the wrong bytes would be continued"
    hub.faults.content.clear()
    assert (get().path / LARGE).read_bytes() == content()


def test_wrong_checksum_outside_lfs(refused: Any, hub: FakeHub) -> None:
    right = repositories()[STDIT]["config.json"]
    hub.faults.content["config.json"] = right.replace(b"STDiT3", b"STDiT4")
    assert "config.json" in (message := refused())
    assert "the checksum" in message


def test_more_bytes_than_announced(refused: Any, hub: FakeHub, root: Path) -> None:
    hub.faults.content["model.safetensors"] = content() + b"more"
    assert "longer than" in refused()
    assert not list((root / STAGING).rglob("*.part"))


def test_fewer_bytes_than_announced(refused: Any, hub: FakeHub) -> None:
    hub.faults.content["model.safetensors"] = content()[:-5]
    message = refused()
    assert f"stopped at {len(content()) - 5} of {len(content())} bytes" in message


def test_wrong_size_in_the_listing(refused: Any, hub: FakeHub) -> None:
    lfs = hub.listing(STDIT, "main", repositories()[STDIT])["siblings"][-1]["lfs"]
    hub.faults.listing["model.safetensors"] = {"lfs": {**lfs, "size": lfs["size"] - 1}}
    assert "longer than" in refused()


def test_a_body_that_is_cut_at_each_attempt_ends(refused: Any, hub: FakeHub, root: Path) -> None:
    """As long as something arrives it goes on; when nothing does, it ends and keeps what came."""
    hub.faults.cuts["model.safetensors"] = [3 * CHUNK, 2 * CHUNK] + [0] * 10 * ATTEMPTS
    message = refused()
    assert f"stopped at {5 * CHUNK} of {len(content())} bytes" in message
    assert "continues" in message
    (part,) = (root / STAGING / "transformer").glob("*.part")
    assert part.read_bytes() == content()[: 5 * CHUNK]


def test_a_busy_server_is_asked_again(get: Get, hub: FakeHub) -> None:
    hub.faults.moments["model.safetensors"] = [(503, "")] * (ATTEMPTS - 1)
    assert get().is_new


def test_a_server_that_stays_busy(refused: Any, hub: FakeHub) -> None:
    hub.faults.status["model.safetensors"] = (503, "")
    assert "503" in refused()


@pytest.mark.parametrize(
    ("name", "status", "code", "words"),
    [
        (STDIT, 401, "", [STDIT, "HF_TOKEN"]),
        (STDIT, 401, "RepoNotFound", [STDIT, "HF_TOKEN"]),
        (STDIT, 404, "RepoNotFound", [STDIT, "Check the name"]),
        (STDIT, 403, "GatedRepo", [STDIT, "gated", "Accept its terms", "HF_TOKEN"]),
        (STDIT, 403, "", [STDIT, "403", "HF_TOKEN"]),
        (STDIT, 500, "", [STDIT, "500"]),
        ("model.safetensors", 403, "GatedRepo", ["gated", f"/{STDIT},"]),
        ("model.safetensors", 401, "", ["model.safetensors", "HF_TOKEN"]),
        ("model.safetensors", 404, "EntryNotFound", ["404", "model.safetensors"]),
    ],
)
def test_refusals_of_the_server(
    refused: Any, hub: FakeHub, name: str, status: int, code: str, words: list[str]
) -> None:
    hub.faults.status[name] = (status, code)
    message = refused()
    for word in words:
        assert word in message


def test_unknown_repository_and_revision(refused: Any) -> None:
    assert "no/such" in refused("vae=no/such")
    message = refused("vae=@v7")
    assert f"{VAE}@v7" in message
    assert "revision" in message


def test_no_server(root: Path, refused: Any, hub: FakeHub) -> None:
    with pytest.raises(WeightsError, match=r"Cannot reach http://127\.0\.0\.1:9"):
        download(root, choose_sources((), {}), Hub("http://127.0.0.1:9"), lambda _: None)


def test_offline(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import _http

    for name in ("close_session", "reset_sessions"):
        getattr(_http, name, lambda: None)()
    try:
        assert "HF_HUB_OFFLINE" in refused()
    finally:
        monkeypatch.undo()
        for name in ("close_session", "reset_sessions"):
            getattr(_http, name, lambda: None)()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"id": "a/b"}', b'{"siblings": 3}'])
def test_an_answer_that_is_no_listing(refused: Any, hub: FakeHub, body: bytes) -> None:
    hub.faults.nonsense = body
    assert "not a listing" in refused()


def test_no_space(refused: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1_000_000))
    message = refused()
    assert "0.0 GB free" in message
    assert WEIGHTS_VARIABLE in message
    assert hub.bytes_served == 0


def test_space_counts_what_is_there(
    get: Get, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for the rest alone is enough to go on."""

    def interrupt(progress: FileProgress) -> None:
        if progress.path == "vae/model.safetensors" and progress.done > 6 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(on_progress=interrupt)
    total = sum(len(d) for repo in repositories().values() for d in repo.values())
    free = MARGIN + total - len(content()) - 6 * CHUNK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, free))
    assert get().is_new


def test_a_disk_that_fills_up(
    refused: Any, get: Get, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(progress: FileProgress) -> None:
        if progress.done > 5 * CHUNK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert "disk is full" in refused(on_progress=full)
    assert list((root / STAGING).rglob("*.part"))
    assert get().is_new


def test_a_folder_that_cannot_be_written(refused: Any, root: Path) -> None:
    root.write_bytes(b"a file where the folder should be")
    message = refused()
    assert str(root) in message
    assert WEIGHTS_VARIABLE in message


def test_only_pickles(refused: Any, hub: FakeHub) -> None:
    files = {"config.json": b"{}", "pytorch_model-00001-of-00002.bin": b"pickle"}
    hub.repos["DeepFloyd/t5-v1_1-xxl"] = Repo(files)
    message = refused("text_encoder=DeepFloyd/t5-v1_1-xxl:")
    for words in ("pickles", "pytorch_model-00001-of-00002.bin", "code", PIXART):
        assert words in message
    assert hub.bytes_served == 0


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.safetensors",
        "text_encoder/../../evil",
        "/etc/evil",
        "text_encoder//evil",
        "text_encoder\\..\\evil",
        "text_encoder/evil\n",
        "./config.json",
        "C:\\evil",
    ],
)
def test_names_that_leave_the_folder(refused: Any, hub: FakeHub, root: Path, name: str) -> None:
    hub.faults.names.append(name)
    message = refused()
    assert "outside its folder" in message
    assert hub.bytes_served == 0
    assert not any(path.is_file() for path in root.rglob("*"))


def test_a_symlink_in_the_repository_is_but_text(refused: Any, hub: FakeHub, root: Path) -> None:
    """Git keeps a link as a small file with its target; it never becomes a link here."""
    hub.repos[VAE].files["config.json"] = b"../../../../../etc/passwd"
    assert "not a model" in refused()
    assert not any(path.is_symlink() for path in root.rglob("*"))


def test_links_in_the_staging_folder_are_not_followed(get: Get, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    (root / STAGING).mkdir(parents=True)
    (root / STAGING / "vae").symlink_to(outside)
    (root / STAGING / "transformer").mkdir()
    (root / STAGING / "transformer" / "config.json").symlink_to(outside / "precious")
    folder = get().path
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["config.json", "text_encoder/model.safetensors.index.json"])
def test_files_that_are_no_model(refused: Any, hub: FakeHub, path: str) -> None:
    repo = hub.repos[PIXART if "/" in path else STDIT]
    repo.files[path] = json.dumps(["no", "object"]).encode()
    assert "not a model" in refused()


def test_a_folder_of_someone_else_is_left_alone(get: Get, hub: FakeHub, root: Path) -> None:
    (root / PUBLISHED).mkdir(parents=True)
    (root / PUBLISHED / "mine.txt").write_text("mine")
    with pytest.raises(WeightsError, match="not downloaded by this command"):
        get()
    assert (root / PUBLISHED / "mine.txt").read_text() == "mine"
    assert hub.requests == []


def test_files_of_someone_else_are_not_replaced(get: Get, hub: FakeHub) -> None:
    folder = get().path
    (folder / "notes.txt").write_text("mine")
    (folder / ".DS_Store").write_bytes(b"nobody's")
    assert not get().is_new
    (folder / LARGE).unlink()
    with pytest.raises(WeightsError, match=r"notes\.txt"):
        get()
    (folder / "notes.txt").unlink()
    assert get().is_new


def test_two_at_once(get: Get, hub: FakeHub) -> None:
    def second(progress: FileProgress) -> None:
        if progress.action == "fetch":
            with pytest.raises(WeightsError, match="Another download"):
                get()

    assert get(on_progress=second).is_new


def test_a_damaged_provenance_is_named(get: Get) -> None:
    folder = get().path
    (folder / "provenance.json").write_text("{")
    with pytest.raises(WeightsError, match=r"provenance\.json is damaged"):
        get()
