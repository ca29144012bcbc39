"""`download --quantize`: from an empty folder to a video of the quantized model, and back again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.loading.model_folder import (
    PUBLISHED,
    QUANTIZED_MODELS,
    WEIGHTS_VARIABLE,
    bundled_folder,
    find_model,
)
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.sources import ENDPOINT_VARIABLE
from mlx_sora.pipeline.locks import model_lock
from tests.helpers.hub_server import FakeHub, Repo
from tests.helpers.published import PIXART, STDIT, VAE

COMMAND = ["download", PUBLISHED, "--quantize", "8"]
MADE = QUANTIZED_MODELS[8]


def bundled() -> dict[str, Repo]:
    """The bundled model's files under the published names."""
    path = find_model("shapes").path
    parts = {
        part: {f.name: f.read_bytes() for f in (path / part).iterdir()}
        for part in ("transformer", "vae", "text_encoder", "tokenizer")
    }
    text = {f"{p}/{n}": data for p in ("text_encoder", "tokenizer") for n, data in parts[p].items()}
    return {STDIT: Repo(parts["transformer"]), VAE: Repo(parts["vae"]), PIXART: Repo(text)}


@pytest.fixture(autouse=True)
def here(hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.delenv(WEIGHTS_VARIABLE)
        hub.repos.clear()
        hub.repos.update(bundled())
    monkeypatch.setenv(ENDPOINT_VARIABLE, hub.endpoint)
    monkeypatch.chdir(tmp_path)


def test_download_doctor_generate(
    root: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "a", "--model", MADE]) == 4
    assert f"download {PUBLISHED} --quantize 8" in capsys.readouterr().err
    assert main(COMMAND) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{root / MADE}\n"
    for words in (
        "fetch vae/model.safetensors",
        "fetched, everything",
        "convert vae",
        "MB written",
    ):
        assert words in captured.err
    assert {path.name for path in root.iterdir()} == {PUBLISHED, MADE}
    assert main(["doctor", MADE]) == 0
    out = capsys.readouterr().out
    assert "sizes and checksums as recorded, from PixArt-alpha/" in out
    assert out.count("quantized to 8 bits in groups of 64") == 2
    words = "generate --steps 2 --width 32 --height 32 --num-frames 1 -o a.png --quiet -p"
    assert main([*words.split(), "a red circle", "--model", MADE]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0
    known = Provenance.read(root / MADE)
    before = Provenance.read(root / PUBLISHED)
    assert known is not None
    assert before is not None
    assert known.model == PUBLISHED
    for path, origin in known.files.items():
        part = path.split("/")[0]
        assert {(o.repo, o.revision) for p, o in before.files.items() if p.startswith(part)} == {
            (origin.repo, origin.revision)
        }


def test_the_original_goes_when_asked_and_is_not_missed(
    root: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", PUBLISHED, "--quiet"]) == 0
    shutil.copy(bundled_folder() / "preview.json", root / PUBLISHED)
    assert main([*COMMAND, "--remove-original"]) == 0
    assert capsys.readouterr().err.endswith("the download is removed\n")
    assert [path.name for path in root.iterdir()] == [MADE]
    assert (root / MADE / "preview.json").is_file()
    assert find_model().path == root / MADE
    hub.requests.clear()
    for words in ([], ["--check"]):
        assert main([*COMMAND, *words]) == 0
        assert "already converted" in capsys.readouterr().err
    assert hub.requests == []


def test_the_original_stays_while_a_run_reads_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--quiet"]) == 0
    with model_lock(root / PUBLISHED):
        assert main([*COMMAND, "--quiet", "--remove-original"]) == 4
    assert "is in use" in capsys.readouterr().err
    assert main(["doctor", PUBLISHED, "--quick"]) == 0


def test_damage_is_mended_from_the_original(
    root: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--quiet"]) == 0
    file = root / MADE / "transformer" / "model-00001-of-00005.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert main(["doctor", MADE]) == 4
    assert f"Repair: python -m mlx_sora {' '.join(COMMAND)} --check" in capsys.readouterr().out
    hub.requests.clear()
    assert main([*COMMAND, "--check", "--quiet"]) == 0
    assert file.read_bytes() == content
    assert hub.requests == []


def test_the_original_stays_when_the_conversion_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.manage.convert.index_text", interrupt)
        assert main([*COMMAND, "--remove-original"]) == 130
    assert not (root / MADE).exists()
    assert main(["doctor", PUBLISHED, "--quick"]) == 0
    capsys.readouterr()
    assert main([*COMMAND, "--remove-original"]) == 0
    assert "13 files of an earlier attempt reused" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == [MADE]


def test_another_source_makes_another_model(root: Path, hub: FakeHub) -> None:
    assert main([*COMMAND, "--quiet"]) == 0
    hub.repos["someone/vae"] = hub.repos[VAE]
    assert main([*COMMAND, "--quiet", "--source", "vae=someone/vae"]) == 0
    known = json.loads((root / MADE / "provenance.json").read_text())
    assert known["files"]["vae/config.json"]["repo"] == "someone/vae"


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--remove-original"], "--quantize"), (["--quantize", "2"], "--quantize")],
)
def test_mistakes(
    root: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", PUBLISHED, *words]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_of_someone_else_is_left_alone(
    root: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / MADE).mkdir(parents=True)
    (root / MADE / "mine").write_text("mine")
    assert main(COMMAND) == 4
    assert "was not downloaded by this command" in capsys.readouterr().err
    assert (root / MADE / "mine").read_text() == "mine"
    assert hub.requests == []
