"""From nothing to a video: download, doctor, generate; and the doctor's commands do mend."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.loading.model_folder import PUBLISHED
from mlx_sora.manage.sources import ENDPOINT_VARIABLE
from tests.helpers.hub_server import FakeHub

LARGE = "transformer/model.safetensors"


@pytest.fixture(autouse=True)
def here(hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENDPOINT_VARIABLE, hub.endpoint)
    monkeypatch.chdir(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def nan(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\xff\xff\xff\xff")


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("tokenizer/spiece.model", Path.unlink),
    "truncated": (LARGE, lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "empty": ("vae/config.json", lambda path: path.write_bytes(b"")),
    "flipped": (LARGE, flip),
    "nan": ("vae/model.safetensors", nan),
    "shard": ("text_encoder/model-00001-of-00002.safetensors", Path.unlink),
}


def test_download_doctor_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", PUBLISHED]) == 4
    assert f"Repair: python -m mlx_sora download {PUBLISHED}\n" in capsys.readouterr().out
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "sizes and checksums as recorded, from PixArt-alpha/" in out
    assert "ERROR" not in out
    words = "generate --steps 2 --width 32 --height 32 --num-frames 1 -o a.png --quiet -p"
    assert main([*words.split(), "a red circle"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_named_command_mends(
    root: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    name, spoil = DAMAGES[damage]
    spoil(root / PUBLISHED / name)
    capsys.readouterr()
    assert main(["doctor"]) == 4
    commands = {
        line.partition("Repair: ")[2]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("ERROR")
    }
    (command,) = commands
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "mlx_sora"]
    assert main(words[3:]) == 0
    capsys.readouterr()
    assert main(["doctor"]) == 0
    assert "ERROR" not in capsys.readouterr().out


def test_quick_looks_at_sizes_only(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    flip(root / PUBLISHED / LARGE)
    assert main(["doctor", "--quick"]) == 0
    assert "checksums as" not in capsys.readouterr().out
    (root / PUBLISHED / LARGE).unlink()
    assert main(["doctor", "--quick"]) == 4


def test_every_finding_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    capsys.readouterr()
    (root / PUBLISHED / "vae/config.json").write_text("{")
    assert main(["doctor"]) == 4
    captured = capsys.readouterr()
    assert captured.err == ""
    marks = {line.split()[0] for line in captured.out.splitlines()}
    assert {"ok", "ERROR"} <= marks <= {"ok", "note", "WARNING", "ERROR"}
