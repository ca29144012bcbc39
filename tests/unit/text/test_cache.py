"""The text cache: what its files hold, when they count, and how large they may grow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.text import cache as module
from mlx_sora.text.cache import TextCache, open_text_cache
from mlx_sora.utils.files import CACHE_VARIABLE

IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(tmp_path / "text", "some T5")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights that did not change of late, and a cache folder."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    later = time.time() + 60
    monkeypatch.setattr(module.time, "time", lambda: later)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1234")
    return file


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_states_come_back_as_they_were(cache: TextCache, dtype: mx.Dtype) -> None:
    states = mx.random.normal((5, 8), key=mx.random.key(0)).astype(dtype)
    assert cache.get(IDS) is None
    assert IDS not in cache
    cache.put(IDS, states)
    found = cache.get(IDS)
    assert IDS in cache
    assert found is not None
    assert found.dtype == dtype
    assert mx.array_equal(found, states)


def test_other_ids_and_other_encoders_have_their_own(cache: TextCache) -> None:
    cache.put(IDS, mx.ones((5, 8)))
    assert cache.get(IDS[:-1]) is None
    assert TextCache(cache.folder, "another T5").get(IDS) is None


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, None])
def test_a_damaged_file_counts_as_none(cache: TextCache, damage: bytes | None) -> None:
    cache.put(IDS, mx.ones((5, 8)))
    assert cache.folder is not None
    (file,) = cache.folder.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data) if damage is None else damage)
    assert cache.get(IDS) is None
    cache.put(IDS, mx.ones((5, 8)))
    assert cache.get(IDS) is not None


def test_what_was_used_least_recently_goes(
    cache: TextCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.folder is not None
    for number in range(4):
        cache.put([number], mx.ones((1, 8)))
        newest = max(cache.folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    assert cache.get([0]) is not None  # used now
    size = newest.stat().st_size
    monkeypatch.setattr(module, "MAX_BYTES", 2 * size)
    cache.prune()
    assert [[number] in cache for number in range(4)] == [True, False, False, True]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = TextCache(tmp_path / "file" / "text", "some T5")
    cache.put(IDS, mx.ones((5, 8)))
    cache.prune()
    assert cache.get(IDS) is None


def test_changed_weights_are_another_encoder(weights: Path) -> None:
    before = open_text_cache([weights], {"dtype": "float32"})
    assert before.folder is not None
    assert open_text_cache([weights], {"dtype": "float32"}) == before
    assert open_text_cache([weights], {"dtype": "bfloat16"}) != before
    stat = weights.stat()
    weights.write_bytes(b"4321")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_text_cache([weights], {"dtype": "float32"}) != before


def test_weights_that_changed_a_moment_ago_are_not_trusted(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = weights.stat().st_ctime + 1
    monkeypatch.setattr(module.time, "time", lambda: now)
    assert open_text_cache([weights], {}).folder is None
    assert open_text_cache([weights.with_name("none")], {}).folder is None
