"""Files that `hf download` has put into the hub's cache: linked, verified, and used in place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import hf_hub_download

from mlx_sora.cli.main import main
from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import PUBLISHED, bundled_folder, find_model
from mlx_sora.loading.networks import load_transformer
from mlx_sora.manage.sources import ENDPOINT_VARIABLE
from tests.helpers.hub_server import FakeHub, Repo, commit_of
from tests.helpers.published import STDIT, repositories
from tests.hub.conftest import Get

LARGE = "model.safetensors"


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `hf_hub_download`, which asks huggingface.co whatever the endpoint is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def fill_cache(hub: FakeHub, *repos: str) -> None:
    """What `hf download REPO` does with each file."""
    for repo in repos or hub.repos:
        for name in hub.repos[repo].files:
            hf_hub_download(repo, name, endpoint=hub.endpoint)
    hub.requests.clear()
    hub.bytes_served = 0


def blobs(cache: Path) -> set[int]:
    return {file.stat().st_ino for file in cache.rglob("blobs/*")}


def test_a_download_takes_the_files_of_the_cache(
    hub: FakeHub, get: Get, cache: Path, root: Path
) -> None:
    fill_cache(hub)
    result = get()
    assert result.is_new
    assert (result.fetched_bytes, hub.bytes_served) == (0, 0)
    model = root / PUBLISHED
    weights = [file for file in model.rglob("*") if file.parent != model and file.is_file()]
    assert result.linked_bytes == sum(file.stat().st_size for file in weights) > 0
    assert {file.stat().st_ino for file in weights} <= blobs(cache)
    shutil.rmtree(cache)  # the model has its own names of the files
    assert get(check=True).is_new is False
    load_transformer(find_model(PUBLISHED), mx.float32)


def test_what_the_cache_lacks_or_has_damaged_is_fetched(
    hub: FakeHub, get: Get, cache: Path
) -> None:
    fill_cache(hub, STDIT)
    blob = next(cache.rglob(f"snapshots/*/{LARGE}")).resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = get()
    assert {r.path.rpartition("/")[2] for r in hub.asked("GET", f"{STDIT}/resolve")} == {LARGE}
    assert result.linked_bytes == len(repositories()[STDIT]["config.json"])
    assert (result.path / "transformer" / LARGE).read_bytes() == content


def test_other_commits(hub: FakeHub, get: Get) -> None:
    """One with the same weights, and one with others, which is not the wanted revision."""
    fill_cache(hub, STDIT)
    files = hub.repos[STDIT].files
    hub.repos[STDIT].revisions["v2"] = files | {"README.md": b"new"}
    assert get(f"transformer={STDIT}@v2").linked_bytes > len(files[LARGE])
    other = files | {
        "config.json": json.dumps({**json.loads(files["config.json"]), "x": 1}).encode()
    }
    hub.repos[STDIT].revisions["v3"] = other
    result = get(f"transformer={STDIT}@v3")
    assert (result.path / "transformer" / "config.json").read_bytes() == other["config.json"]
    assert result.fetched_bytes == len(other["config.json"])


def test_a_cache_on_another_disk_is_referred_to(
    hub: FakeHub, get: Get, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    fill_cache(hub)
    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.manage.download.os.link", refuse)
        get()
        assert hub.bytes_served == 0
    file = root / PUBLISHED / "transformer" / LARGE
    assert file.is_symlink()
    load_transformer(find_model(PUBLISHED), mx.float32)
    assert get(check=True).is_new is False
    file.resolve().unlink()
    assert get().is_new
    assert not file.is_symlink()
    assert hub.bytes_served == file.stat().st_size


def test_offline(
    hub: FakeHub,
    root: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(ENDPOINT_VARIABLE, hub.endpoint)
    fill_cache(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["download", PUBLISHED]) == 0
    assert "linked from the hub's cache, 0 B fetched" in capsys.readouterr().err
    assert hub.requests == []
    known = json.loads((root / PUBLISHED / "provenance.json").read_text())["files"]
    assert known["transformer/config.json"]["revision"] == commit_of("main")
    next(cache.rglob(f"snapshots/*/{LARGE}")).unlink()
    shutil.rmtree(root)
    assert main(["download", PUBLISHED]) == 4
    assert "the hub's cache does not hold all of" in capsys.readouterr().err


def test_a_model_folder_in_the_cache(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository in the layout of a model folder is used where `hf download` put it."""
    bundled = bundled_folder()
    files = {
        file.relative_to(bundled).as_posix(): file.read_bytes()
        for file in bundled.rglob("*")
        if file.suffix in (".json", ".safetensors", ".model")
    }
    hub.repos["me/sora"] = Repo(files)
    fill_cache(hub, "me/sora")
    repo = cache / "models--me--sora"
    snapshot = repo / "snapshots" / commit_of("main")
    monkeypatch.chdir(tmp_path)
    words = "generate --steps 1 --width 32 --height 32 --num-frames 1 -o a.png --quiet -p red"
    assert main([*words.split(), "--model", str(snapshot)]) == 0
    assert (tmp_path / "a.png").is_file()
    with pytest.raises(WeightsError) as caught:
        find_model(repo)
    assert f"The model folder is {snapshot}" in caught.value.fix
