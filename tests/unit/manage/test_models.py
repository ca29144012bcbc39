"""The models on this machine: what the list says of each, what fits, and what is removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.model_folder import (
    BUNDLED,
    PUBLISHED,
    WEIGHTS_VARIABLE,
    ModelFolder,
    bundled_folder,
    find_model,
    model_names,
    weights_root,
)
from mlx_sora.loading.published import PublishedModel
from mlx_sora.manage import models
from mlx_sora.manage.convert import staging_folder
from mlx_sora.manage.doctor import repair_command
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.models import Fit, default_fit, freed_bytes, remove_model
from mlx_sora.manage.provenance import FileOrigin, Provenance
from mlx_sora.manage.staging import folder_lock
from mlx_sora.pipeline.locks import model_lock
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.utils.files import CACHE_VARIABLE

COMMIT = "0123456789" * 4


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models with `mine`, a copy of the bundled one."""
    folder = tmp_path / "weights"
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(folder))
    shutil.copytree(bundled_folder(), folder / "mine")
    (folder / "mine" / "provenance.json").unlink()
    return folder


def record(folder: Path, conversion: dict[str, object] | None = None) -> None:
    origin = FileOrigin("someone/vae", COMMIT, "config.json", 3, "")
    Provenance("mine", "", {"vae/config.json": origin}, conversion or {}).write(folder)


def yes(_: object) -> bool:
    return True


def test_the_list(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(model: ModelFolder) -> Fit:  # planning the published ones takes seconds
        return Fit(False, "", 9) if isinstance(model, PublishedModel) else default_fit(model)

    monkeypatch.setattr(models, "default_fit", fit)
    (root / STAGING / "vae").mkdir(parents=True)
    (root / STAGING / "vae" / "config.json").write_bytes(b"123")
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert list(rows)[:2] == [BUNDLED, "mine"]
    assert rows[BUNDLED]["origin"] == "bundled"
    mine = rows["mine"]
    assert mine["origin"] == "folder"
    assert (mine["bits"], mine["fits"], mine["options"]) == (16, True, "")
    assert mine["path"] == str(root / "mine")
    assert mine["bytes"] == sum(f.stat().st_size for f in (root / "mine").rglob("*") if f.is_file())
    assert rows[PUBLISHED]["path"] is None
    assert rows[PUBLISHED]["bytes"] == 3
    assert rows[PUBLISHED]["origin"].startswith("continue it: python -m mlx_sora download")
    assert rows[f"{PUBLISHED}-4bit"]["bits"] == 4
    (root / "mine" / "vae" / "config.json").unlink()
    assert main(["models"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["name", "size", "bits", "fits", "origin"]
    assert "15 MB" in out[1]
    assert "vae/config.json is missing" in out[2]


def test_origins(root: Path) -> None:
    record(root / "mine")
    assert models.describe_origin(root / "mine") == "downloaded from someone/vae@0123456"
    record(root / "mine", {"source": "/a/b", "dtype": None, "quantization": None})
    assert models.describe_origin(root / "mine") == "converted from /a/b"


def test_what_fits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"defaults": {"width": 1280, "height": 720, "num_frames": 17}}
    (root / "mine" / "model_index.json").write_text(json.dumps(index))
    model = ModelFolder.open(root / "mine")
    request = GenerationRequest(prompt="a test", seed=0, memory_budget="off")
    whole = Pipeline(model).plan(request)
    tiled = Pipeline(model).plan(replace(request, vae_tiles=2))
    assert tiled.smallest < whole.smallest < whole.peak
    for capacity, options in (
        (whole.peak, ""),
        (whole.smallest, "--memory-budget auto"),  # which GPUs have by default
        (tiled.smallest, "--vae-tiles 2 --memory-budget auto"),
    ):
        monkeypatch.setattr(models, "machine_capacity", lambda n=capacity: n)
        fit = default_fit(model)
        assert (fit.fits, fit.options) == (True, options)
        assert fit.needed == (tiled if "tiles" in options else whole).smallest
    monkeypatch.setattr(models, "machine_capacity", lambda: 10**6)
    assert default_fit(model) == Fit(False, "", tiled.smallest)


def test_removal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = freed_bytes(root / "mine")
    assert size > 10**7
    os.link(root / "mine" / "vae" / "model.safetensors", root / "elsewhere")
    shared = (root / "elsewhere").stat().st_size
    left = staging_folder(root / "mine")
    (left / "vae").mkdir(parents=True)
    assert main(["models", "rm", "mine"]) == 2  # nobody to ask
    assert "Add --yes" in capsys.readouterr().err
    assert main(["models", "rm", "mine", "--yes"]) == 0
    assert capsys.readouterr().out == f"mine removed, {(size - shared) / 1e6:.0f} MB freed\n"
    assert [path.name for path in root.iterdir()] == ["elsewhere"]


def test_a_link_is_removed_and_what_it_leads_to_stays(root: Path, tmp_path: Path) -> None:
    (root / "mine").rename(tmp_path / "away")
    (root / "mine").symlink_to(tmp_path / "away")
    removal = remove_model("mine", yes)
    assert removal is not None
    assert removal.freed == 0
    assert (tmp_path / "away" / "vae").is_dir()
    assert list(root.iterdir()) == []


def test_nothing_is_removed_unasked(root: Path) -> None:
    assert remove_model("mine", lambda _: False) is None
    assert (root / "mine" / "vae").is_dir()


def test_what_stays(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (BUNDLED, str(bundled_folder())):
        with pytest.raises(UsageError, match="part of mlx_sora"):
            remove_model(name, yes)
    (root / "documents").mkdir()
    for name, near in (("documents", ""), ("nine", "mean mine"), (f"{root}/mune", "mean mine")):
        with pytest.raises(WeightsError, match="There is no model") as caught:
            remove_model(name, yes)
        assert near in caught.value.fix
    shutil.copytree(root / "mine", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for name in ("other", "weights/mine/vae", "weights"):
        with pytest.raises(UsageError, match="outside the folders of models"):
            remove_model(name, yes)
    assert (tmp_path / "other").is_dir()


def test_a_model_in_use_stays(root: Path) -> None:
    folder = root / "mine"
    staging = staging_folder(folder)
    for lock in (model_lock(folder), folder_lock(root, "download"), folder_lock(staging, "x")):
        with lock, pytest.raises(WeightsError, match="is in use"):
            remove_model("mine", yes)
    pipe = Pipeline(ModelFolder.open(folder))
    request = GenerationRequest("a", steps=1, num_frames=1, width=32, height=32)
    events: Iterator[object] = pipe.stream(request)
    next(events)
    with pytest.raises(WeightsError, match="is in use"):
        remove_model("mine", yes)
    events.close()  # type: ignore[attr-defined]

    def confirm(_: object) -> bool:
        with pytest.raises(WeightsError, match="is being removed"):
            next(pipe.stream(request))
        return True

    assert remove_model("mine", confirm) is not None


def test_names_mean_folders_of_models_everywhere(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "mine" / "model_index.json").unlink()
    assert find_model("mine").path == root / "mine"
    assert model_names() == [BUNDLED, "mine"]
    assert find_model().path == bundled_folder()  # which a folder of one's own does not hide
    with pytest.raises(WeightsError, match="No model folder") as caught:
        find_model("nine")
    assert caught.value.fix.startswith("Did you mean mine?")


def test_models_of_a_clone_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, cache = tmp_path / "clone", tmp_path / "cache"
    monkeypatch.setattr("mlx_sora.loading.model_folder._PACKAGE_ROOT", clone)
    monkeypatch.delenv(WEIGHTS_VARIABLE)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    (clone / PUBLISHED).mkdir(parents=True)
    assert weights_root() == cache / "models"
    assert model_names() == [PUBLISHED]
    with pytest.raises(WeightsError, match="incomplete"):
        find_model(PUBLISHED)


def test_what_mends_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    shapes = clone / "weights" / BUNDLED
    monkeypatch.setattr("mlx_sora.loading.model_folder._PACKAGE_ROOT", shapes.parent)
    assert repair_command(shapes) == f"git -C {clone} checkout -- weights/{BUNDLED}"
    (clone / ".git").rmdir()
    assert "--force-reinstall" in repair_command(shapes)
