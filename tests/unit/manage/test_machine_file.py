"""The machine file: written whole, read back, and ignored with one line where it is not true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.errors import MlxSoraError
from mlx_sora.manage.machine_file import (
    MEASURE_COMMAND,
    machine_file,
    machine_identity,
    read_speeds,
    write_speeds,
)
from mlx_sora.utils.files import cache_folder
from tests.helpers.speeds import SPEEDS

HERE = replace(SPEEDS, machine=machine_identity())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SORA_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


def test_speeds_are_read_as_written(cache: Path) -> None:
    write_speeds(SPEEDS)
    assert write_speeds(HERE) == machine_file() == cache / "machine.json"
    assert [path.name for path in cache.iterdir()] == ["machine.json"]
    assert read_speeds().speeds == HERE
    assert read_speeds().notice == ""


def test_without_a_file_the_notice_says_how_to_measure() -> None:
    known = read_speeds()
    assert known.speeds is None
    assert known.notice == f"To foresee seconds on this machine: {MEASURE_COMMAND}"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mlx", "0.1", "version of MLX"),
        ("platform", "Darwin 9", "system"),
        ("device", "Apple M9", "device"),
        ("memory", 1, "memory"),
        ("blas", "slow", "BLAS"),
    ],
)
def test_a_file_of_another_machine_is_ignored(name: str, value: Any, words: str) -> None:
    write_speeds(replace(HERE, machine={**HERE.machine, name: value}))
    known = read_speeds()
    assert known.speeds is None
    assert f"another {words}" in known.notice
    assert MEASURE_COMMAND in known.notice


@pytest.mark.parametrize("content", ["half", "[]", '{"format": 0}', '{"format": 1}', "\x1b[31m"])
def test_a_damaged_file_is_ignored_with_one_line(cache: Path, content: str) -> None:
    path = write_speeds(HERE)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if content == "half" else content)
    known = read_speeds()
    assert known.speeds is None
    assert known.notice.isprintable()
    assert MEASURE_COMMAND in known.notice


def test_a_folder_in_place_of_the_file_is_ignored(cache: Path) -> None:
    (cache / "machine.json").mkdir(parents=True)
    assert "cannot be read" in read_speeds().notice


def test_a_cache_that_cannot_be_written_is_one_line(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(MlxSoraError, match="Cannot write"):
        write_speeds(HERE)
    assert read_speeds().speeds is None


def test_threads_of_a_gpu_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    facts = machine_identity()
    assert facts["threads"] == ("7" if facts["backend"] == "cpu" else None)
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("system", "xdg", "folder"),
    [
        ("darwin", "/xdg", "/home/me/Library/Caches/mlx_sora"),
        ("linux", "/xdg", "/xdg/mlx_sora"),
        ("linux", "relative", "/home/me/.cache/mlx_sora"),
        ("linux", None, "/home/me/.cache/mlx_sora"),
    ],
)
def test_the_cache_folder_follows_the_system(
    monkeypatch: pytest.MonkeyPatch, system: str, xdg: str | None, folder: str
) -> None:
    monkeypatch.delenv("MLX_SORA_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("mlx_sora.utils.files.sys.platform", system)
    if xdg is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert str(cache_folder()) == folder
