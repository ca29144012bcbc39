"""Fingerprints: any changed byte is noticed, and large files are read once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random

import pytest

from mlx_sora import Pipeline
from mlx_sora.errors import WeightsError
from mlx_sora.loading import fingerprint as module
from mlx_sora.loading.fingerprint import FileHashes, fingerprint, weight_files
from mlx_sora.loading.model_folder import PARTS, ModelFolder, find_model
from mlx_sora.pipeline import engine
from mlx_sora.runtime.events import StageFinished, StageProgress, StageStarted


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    return ModelFolder.open(shutil.copytree(find_model("shapes").path, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Store hashes in a folder of this test, also of small files that were just written."""
    monkeypatch.setenv("MLX_SORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "_CLOCK_STEP", -(10**12))
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(range(256)) * 16_384)
    return path


def flip(file: Path, position: int) -> None:
    """Change one bit in place, as a failing disk does: size, inode and time stay."""
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("part", PARTS)
def test_any_bit_of_any_tensor_counts(model: ModelFolder, part: str) -> None:
    random = Random(part)
    tensors = random.sample(list(model.checkpoint(part).tensors.values()), 8)
    found = {fingerprint(model)}
    for info in tensors:
        position = info.offset + random.randrange(info.nbytes)
        flip(info.file, position)
        found.add(fingerprint(model))
        flip(info.file, position)
    assert len(found) == 1 + len(tensors)
    assert fingerprint(model) in found


def test_configuration_and_tokenizer_count_by_what_they_say(model: ModelFolder) -> None:
    before = fingerprint(model)
    config = model.transformer / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values, indent=8))
    assert fingerprint(model) == before
    config.write_text(json.dumps(values | {"depth": 1}))
    assert fingerprint(model) != before
    config.write_text(json.dumps(values))
    flip(model.tokenizer, 3000)
    assert fingerprint(model) != before


def test_names_and_places_of_files_do_not_count(model: ModelFolder) -> None:
    (model.vae / "model.safetensors").rename(model.vae / "other.safetensors")
    assert fingerprint(model) == fingerprint(find_model("shapes"))


def test_a_file_is_read_once(cache: Path, file: Path) -> None:
    first = FileHashes()
    assert first.unread([file]) == [file]
    digest = first.hash(file)
    assert first.unread([file]) == []
    later = FileHashes()
    assert later.unread([file]) == []
    assert later.hash(file, on_read=pytest.fail) == digest
    assert list(cache.parent.iterdir()) == [cache]


def test_a_file_with_its_earlier_time_is_read_again(cache: Path, file: Path) -> None:
    hashes = FileHashes()
    before = hashes.hash(file)
    flip(file, 1_000_000)
    assert hashes.hash(file) != before
    assert FileHashes().hash(file) != before
    flip(file, 1_000_000)
    assert hashes.hash(file) == before
    copy = Path(shutil.copy2(file, file.with_name("copy")))
    flip(copy, 5)
    copy.replace(file)
    assert hashes.hash(file) != before


def test_a_file_that_was_just_written_is_not_stored(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change could leave its time as it is."""
    monkeypatch.setattr(module, "_CLOCK_STEP", 2_000_000_000)
    FileHashes().hash(file)
    assert not cache.exists()


def test_small_files_are_always_read(file: Path) -> None:
    hashes = FileHashes()
    hashes.hash(file)
    assert hashes.unread([file]) == [file]


def test_links_of_the_hub_lead_to_one_hash(cache: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    FileHashes().hash(tmp_path / "link")
    assert FileHashes().unread([file, tmp_path / "link"]) == []


def test_an_interrupted_reading_stores_nothing(cache: Path, file: Path) -> None:
    hashes = FileHashes()
    reading = hashes.read(file)
    next(reading)
    reading.close()
    assert hashes.unread([file]) == [file]
    assert not cache.exists()


def test_a_file_that_is_rewritten_meanwhile_is_refused(cache: Path, file: Path) -> None:
    reading = FileHashes().read(file)
    next(reading)
    flip(file, 0)
    with pytest.raises(WeightsError, match="rewritten while it was read"):
        list(reading)
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 9}',
        '{"format": 1, "files": {"a": 3}}',
        '{"format": 1, "files": 3}',
        '{"format": 1, "files": {"FILE": [[4194304, 1], "x"]}}',
    ],
)
def test_a_damaged_cache_is_replaced(cache: Path, file: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content.replace("FILE", str(file)))
    digest = FileHashes().hash(file)
    assert json.loads(cache.read_text())["files"][str(file)][1] == digest


def test_without_a_cache_folder_a_process_remembers(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SORA_CACHE", str(file / "no-folder"))
    hashes = FileHashes()
    hashes.hash(file)
    assert hashes.unread([file]) == []
    assert FileHashes().unread([file]) == [file]


def test_the_cache_does_not_grow_for_ever(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 2)
    copies = [Path(shutil.copy(file, file.with_name(f"copy-{i}"))) for i in range(3)]
    for copy in copies:
        FileHashes().hash(copy)
    assert list(json.loads(cache.read_text())["files"]) == list(map(str, copies[1:]))


def test_reading_is_shown_once(
    cache: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SHOWN_BYTES", 1)
    pipe = Pipeline(model)
    size = sum(file.stat().st_size for files in weight_files(model).values() for file in files)
    assert pipe.engine.unread_bytes == size
    events = list(pipe.engine.hash_weights())
    assert events[0] == StageStarted("hash", size // 10**6)
    steps = [event for event in events if isinstance(event, StageProgress)]
    assert 5 < len(steps) <= 100
    assert [event.done for event in steps] == sorted(event.done for event in steps)
    assert isinstance(events[-1], StageFinished)
    assert list(pipe.engine.hash_weights()) == []
    assert pipe.engine.fingerprint() == fingerprint(model)
