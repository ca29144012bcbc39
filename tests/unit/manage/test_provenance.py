"""Provenance: written, read back, and held against the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.manage.progress import FileProgress
from mlx_sora.manage.provenance import FILE, FileOrigin, Provenance
from mlx_sora.utils.files import git_sha1, sha256

CONTENT = {"vae/config.json": b"{}", "vae/model.safetensors": b"weights" * 1000}


def make(folder: Path) -> Provenance:
    (folder / "vae").mkdir()
    files = {}
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
        checksum = hashlib.sha256(content).hexdigest()
        files[name] = FileOrigin("a/b", "f" * 40, name, len(content), checksum)
    return Provenance("opensora-1.2", "https://hub.example", files)


def test_it_comes_back(tmp_path: Path) -> None:
    provenance = make(tmp_path)
    provenance.write(tmp_path)
    assert Provenance.read(tmp_path) == provenance
    assert Provenance.read(tmp_path / "vae") is None
    content = json.loads((tmp_path / FILE).read_text())
    assert content["format"] == 1
    assert content["written_by"].startswith("mlx_sora ")


def test_folder_of_a_file() -> None:
    assert FileOrigin("a/b", "0", "config.json", 1, "").folder == ""
    assert FileOrigin("a/b", "0", "x/y/config.json", 1, "").folder == "x/y"


def test_damage_is_found(tmp_path: Path) -> None:
    provenance = make(tmp_path)
    seen: list[FileProgress] = []

    def damaged() -> list[str]:
        return provenance.damaged_files(tmp_path, True, seen.append)

    assert provenance.damaged_files(tmp_path) == damaged() == []
    assert {(p.path, p.done) for p in seen} == {(n, len(c)) for n, c in CONTENT.items()}
    assert {p.action for p in seen} == {"check"}
    weights = tmp_path / "vae/model.safetensors"
    weights.write_bytes(CONTENT["vae/model.safetensors"][:-1] + b"S")
    assert provenance.damaged_files(tmp_path) == []
    assert damaged() == ["vae/model.safetensors"]
    weights.write_bytes(b"")
    (tmp_path / "vae/config.json").unlink()
    assert provenance.damaged_files(tmp_path) == damaged() == sorted(CONTENT)


def test_checksums_are_those_of_lfs_and_git(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"hello\n")
    assert sha256(file) == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert git_sha1(file) == "ce013625030ba8dba906f756967f9e9ca394464a"  # as git hash-object says


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"files": {}}',
        '{"model": "a", "endpoint": "b", "files": {"x": {}}}',
        '{"model": "a", "endpoint": "b", "files": {"../x": '
        '{"repo": "", "revision": "", "name": "", "bytes": 1, "sha256": ""}}}',
        '{"model": "a", "endpoint": "b", "files": {"x": '
        '{"repo": "", "revision": "", "name": "", "bytes": "1", "sha256": ""}}}',
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(WeightsError, match="damaged"):
        Provenance.read(tmp_path)
