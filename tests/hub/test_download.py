"""Downloads that go well: fresh, resumed, repeated, repaired, from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import PUBLISHED, find_model
from mlx_sora.loading.networks import load_text_encoder, load_transformer, load_vae
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.progress import FileProgress
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.statistics import RECORDS
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.utils.files import sha256
from tests.helpers.hub_server import FakeHub, Repo, commit_of
from tests.helpers.published import PIXART, STDIT, VAE, repositories
from tests.hub.conftest import CHUNK, Get

LARGE = "transformer/model.safetensors"
LAYOUT = {
    *RECORDS,
    "transformer/config.json",
    LARGE,
    "vae/config.json",
    "vae/model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/spiece.model",
}


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def whole_size() -> int:
    files = repositories()
    wanted = [files[STDIT], files[VAE]]
    plain = [f for repo in wanted for n, f in repo.items() if n[0] != "." and n != "README.md"]
    pixart = [
        f
        for n, f in files[PIXART].items()
        if n.startswith("text_encoder/") or n == "tokenizer/spiece.model"
    ]
    return sum(map(len, plain + pixart))


def test_a_fresh_download_is_a_model(get: Get, hub: FakeHub, root: Path) -> None:
    import mlx.core as mx

    seen: list[FileProgress] = []
    outcome = get(on_progress=seen.append)
    assert outcome.path == root / PUBLISHED
    assert (outcome.is_new, outcome.fetched_bytes) == (True, whole_size())
    assert hub.bytes_served == whole_size(), "files that a model does not need were fetched"
    assert names(root) == {f"{PUBLISHED}/{name}" for name in LAYOUT}
    model = find_model()
    assert model.name == PUBLISHED
    load_transformer(model, mx.float32)
    load_text_encoder(model, mx.float32)
    load_vae(model)
    Tokenizer.load(model.tokenizer)
    last = {(p.action, p.path): p for p in seen}
    assert {path for action, path in last if action == "fetch"} == LAYOUT - set(RECORDS)
    assert all(p.done == p.total for p in last.values())


def test_provenance_names_repository_commit_and_checksum(get: Get, hub: FakeHub) -> None:
    folder = get().path
    provenance = Provenance.read(folder)
    assert provenance is not None
    assert provenance.endpoint == hub.endpoint
    assert set(provenance.files) == LAYOUT - set(RECORDS)
    for path, origin in provenance.files.items():
        content = (folder / path).read_bytes()
        assert repositories()[origin.repo][origin.name] == content
        assert (origin.bytes, origin.sha256) == (len(content), sha256(folder / path))
        assert origin.revision == commit_of("main")


def test_files_are_asked_for_at_the_commit_of_the_listing(get: Get, hub: FakeHub) -> None:
    get()
    resolved = hub.asked("GET", "/resolve/")
    assert len(resolved) == len(LAYOUT) - len(RECORDS)
    assert all(f"/resolve/{commit_of('main')}/" in request.path for request in resolved)


def test_a_whole_model_is_left_alone_without_a_request(get: Get, hub: FakeHub) -> None:
    get()
    hub.requests.clear()
    for check in (False, True):
        outcome = get(check=check)
        assert (outcome.is_new, outcome.fetched_bytes) == (False, 0)
    assert hub.requests == []


@pytest.mark.parametrize("cut", [0, 5 * CHUNK + 100])
def test_a_cut_connection_is_taken_up_again(get: Get, hub: FakeHub, cut: int) -> None:
    hub.faults.cuts["model.safetensors"] = [cut]
    outcome = get()
    content = repositories()[STDIT]["model.safetensors"]
    assert (outcome.path / LARGE).read_bytes() == content
    ranges = [r.headers.get("Range") for r in hub.asked("GET", f"/cdn/{STDIT}")]
    kept = cut - cut % CHUNK
    assert ranges == [None, f"bytes={kept}-" if kept else None]


def test_an_interrupted_download_is_no_model_and_continues(
    get: Get, hub: FakeHub, root: Path
) -> None:
    size = len(repositories()[STDIT]["model.safetensors"])

    def interrupt(progress: FileProgress) -> None:
        if progress.path == LARGE and progress.done > size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(on_progress=interrupt)
    assert not (root / PUBLISHED).exists()
    with pytest.raises(WeightsError, match=f"download {PUBLISHED}"):
        find_model(PUBLISHED)
    (part,) = (root / STAGING / "transformer").glob("*.part")
    have = part.stat().st_size
    assert size // 2 < have < size
    before = hub.bytes_served
    outcome = get()
    assert outcome.is_new
    assert (outcome.path / LARGE).read_bytes() == repositories()[STDIT]["model.safetensors"]
    last = hub.asked("GET", f"/cdn/{STDIT}")[-1]
    assert last.headers["Range"] == f"bytes={have}-"
    fetched_before = have + len(repositories()[STDIT]["config.json"])
    assert outcome.fetched_bytes == hub.bytes_served - before == whole_size() - fetched_before
    assert not (root / STAGING).exists()


def test_a_spoilt_beginning_is_found_and_fetched_anew(get: Get, root: Path) -> None:
    def interrupt(progress: FileProgress) -> None:
        if progress.path == LARGE and progress.done > 3 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(on_progress=interrupt)
    (part,) = (root / STAGING / "transformer").glob("*.part")
    part.write_bytes(b"\0" * part.stat().st_size)
    with pytest.raises(WeightsError, match="the checksum"):
        get()
    assert not (root / PUBLISHED).exists()
    assert (get().path / LARGE).read_bytes() == repositories()[STDIT]["model.safetensors"]


def test_a_server_without_ranges_sends_everything_again(get: Get, hub: FakeHub) -> None:
    hub.faults.no_ranges = True
    hub.faults.cuts["model.safetensors"] = [3 * CHUNK]
    path = LARGE
    try:
        folder = get().path
    except WeightsError:  # older clients append the whole file; it is found out and dropped
        folder = get().path
    assert (folder / path).read_bytes() == repositories()[STDIT]["model.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_model_is_mended_with_what_is_damaged(
    get: Get, hub: FakeHub, root: Path, damage: str
) -> None:
    file = get().path / LARGE
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + b"\x01")
    hub.bytes_served = 0
    outcome = get(check=damage == "flipped")
    assert outcome.is_new
    assert outcome.fetched_bytes == hub.bytes_served == len(content)
    assert file.read_bytes() == content
    assert names(root) == {f"{PUBLISHED}/{name}" for name in LAYOUT}


def test_a_repair_fetches_the_commit_that_is_there(get: Get, hub: FakeHub) -> None:
    file = get().path / LARGE
    old = dict(hub.repos[STDIT].files)
    hub.repos[STDIT].revisions[commit_of("main")] = old
    hub.repos[STDIT].files = {**old, "model.safetensors": b"a new version"}
    file.unlink()
    get()
    assert file.read_bytes() == old["model.safetensors"]


def test_another_revision_replaces_only_what_differs(get: Get, hub: FakeHub, root: Path) -> None:
    folder = get().path
    config = json.dumps(json.loads((folder / "vae/config.json").read_bytes()) | {"new": 1}).encode()
    hub.repos[VAE].revisions["v2"] = {**hub.repos[VAE].files, "config.json": config}
    outcome = get("vae=@v2")
    assert (outcome.is_new, outcome.fetched_bytes) == (True, len(config))
    assert (folder / "vae/config.json").read_bytes() == config
    provenance = Provenance.read(folder)
    assert provenance is not None
    assert provenance.files["vae/config.json"].revision == commit_of("v2")
    assert provenance.files["vae/model.safetensors"].revision == commit_of("v2")
    assert provenance.files[LARGE].revision == commit_of("main")
    assert names(root) == {f"{PUBLISHED}/{name}" for name in LAYOUT}
    hub.requests.clear()
    assert not get(f"vae=@{commit_of('v2')}").is_new
    assert hub.requests == []


def test_a_failed_replacement_leaves_the_old_model(get: Get, hub: FakeHub, root: Path) -> None:
    folder = get().path
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    hub.repos[VAE].revisions["v2"] = {**hub.repos[VAE].files, "model.safetensors": b"no tensors"}
    with pytest.raises(WeightsError, match="not a model"):
        get("vae=@v2")
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert not get().is_new
    assert not list(root.glob(".*.old"))


def test_another_repository_and_folder(get: Get, hub: FakeHub) -> None:
    files = {n: d for n, d in repositories()[PIXART].items() if n.startswith("text_encoder/")}
    moved = {name.replace("text_encoder/", "t5/"): data for name, data in files.items()}
    hub.repos["someone/t5.v1_1"] = Repo(moved)
    folder = get("text_encoder=someone/t5.v1_1:t5").path
    assert names(folder) == LAYOUT
    provenance = Provenance.read(folder)
    assert provenance is not None
    assert provenance.files["text_encoder/config.json"].name == "t5/config.json"
    assert hub.asked("GET", "/api/models/someone/t5.v1_1")


def test_a_mirror_whose_listing_lacks_sizes_is_asked_file_by_file(get: Get, hub: FakeHub) -> None:
    hub.faults.listing = {
        name: {"size": None, "blobId": None, "lfs": None}
        for files in repositories().values()
        for name in files
    }
    assert names(get().path) == LAYOUT
    assert len(hub.asked("HEAD", "/resolve/")) == len(LAYOUT) - len(RECORDS)


def test_a_login_is_sent_to_the_hub_and_to_no_one_else(
    get: Get, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get()
    asked = [r for r in hub.requests if not r.path.startswith("/cdn/")]
    assert all(r.headers.get("Authorization") == "Bearer hf_secret" for r in asked)
    redirected = [r for r in hub.requests if r.path.startswith("/cdn/")]
    assert redirected
    assert not any("Authorization" in r.headers for r in redirected)


def test_the_clients_settings_are_as_before(get: Get) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, logging

    def settings() -> list[object]:
        rust = getattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", None)
        telemetry = not constants.HF_HUB_DISABLE_TELEMETRY
        return [are_progress_bars_disabled(), logging.get_verbosity(), telemetry, rust]

    before = settings()
    during: list[list[object]] = []
    get(
        on_progress=lambda progress: (
            during.append(settings()) if progress.action == "fetch" else None
        )
    )
    assert settings() == before
    assert all(bars_off and not telemetry for bars_off, _, telemetry, _ in during)
