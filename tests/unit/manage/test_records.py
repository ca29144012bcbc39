"""What the doctor finds in a model whose records were left, removed or made to fit: a sample.

`python -m pytest -m longrun tests/longrun/test_doctor.py` tries all of it, and makes the videos.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import BUNDLED
from mlx_sora.manage import doctor, records, statistics
from mlx_sora.manage.doctor import ModelChecker, foresee_reading
from mlx_sora.manage.provenance import FILE, Provenance
from mlx_sora.manage.records import Diagnostic
from mlx_sora.pipeline.pipeline import Pipeline
from tests.helpers import harmless, mutations

#: One case of each kind of change, of folder and of records.
SAMPLE = [
    ("bytes flipped", "bundled", "left"),
    ("rows shuffled", "8-bit", "removed"),
    ("scales", "8-bit", "forged"),
    ("swapped", "8-bit", "resigned"),
    ("other text encoder", "bundled", "forged"),
    ("groups", "8-bit", "resigned"),
    ("guidance", "bundled", "removed"),
    ("distances", "8-bit", "forged"),
    ("preview", "bundled", "forged"),
    ("table", "bundled", "resigned"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: mutations.write_folder(kind, root / kind) for kind in ("bundled", "8-bit")}


@pytest.fixture(autouse=True)
def _no_smoke_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of the time, and find little of this."""
    monkeypatch.setattr(ModelChecker, "_run_smoke_tests", lambda self: iter(()))


def check(model: Path, *, quick: bool = False) -> list[Diagnostic]:
    return list(ModelChecker(model, quick).run())


def faults(model: Path, *, quick: bool = False) -> list[str]:
    found = check(model, quick=quick)
    return [f"{d.subject}: {d.message}" for d in found if d.level in ("warning", "error")]


@pytest.mark.parametrize(("name", "kind", "how"), SAMPLE)
def test_changes_are_found(
    folders: dict[str, Path], tmp_path: Path, name: str, kind: str, how: str
) -> None:
    model = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    mutation = next(each for each in mutations.MUTATIONS if each.name == name)
    mutation.change(model, np.random.default_rng(1))
    mutations.tamper_records(model, how)
    assert faults(model)


@pytest.mark.parametrize("name", ["other order", "three shards", "sorted keys", "links", "4 bits"])
def test_harmless_changes_are_no_faults(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model = Path(shutil.copytree(folders["bundled"], tmp_path / "model"))
    assert faults(harmless.HARMLESS[name](model)) == []


def test_the_bundled_model_needs_its_own_records(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of all of its records is found by the checksum in the package."""
    model = Path(shutil.copytree(folders["bundled"], tmp_path / BUNDLED))
    monkeypatch.setattr(records, "bundled_folder", lambda: model)
    assert faults(model) == []
    mutations.scale("vae", "scale", 1.5)(model, np.random.default_rng(1))
    mutations.tamper_records(model, "forged")
    assert faults(model, quick=True) == ["files: statistics.json is not that of this version."]
    mutations.tamper_records(model, "removed")
    assert faults(model, quick=True) == [
        f"files: {name} is missing." for name in (statistics.FILE, FILE)
    ]


def test_files_that_are_not_recorded_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(folders["8-bit"], tmp_path / "model"))
    harmless.add_files(model, "a.bin", "NOTES.md", ".hidden")
    record = Provenance.read(model)
    assert record is not None
    files = {name: file for name, file in record.files.items() if name != "preview.json"}
    replace(record, files=files).write(model)
    found = {(d.level, d.message) for d in check(model, quick=True)}
    assert ("note", "not recorded: NOTES.md; a.bin.") in found
    assert ("warning", "preview.json is not recorded, but generate reads it.") in found


@pytest.mark.parametrize(
    ("file", "path", "value", "says"),
    [
        ("vae/config.json", "micro_frame_size", 8, "micro_frame_size is 8, not Open-Sora's 17"),
        ("vae/config.json", "scale", [1, 0, 1, 1], "scale is 0, which erases a channel"),
        ("vae/config.json", "shift", [1e9, 0, 0, 0], "shift is not 4 numbers up to 1000"),
        ("transformer/config.json", "patch_size", [1, 1, 4], "has patches of [1, 2, 2]"),
        ("transformer/config.json", "num_heads", 8, "rope.freqs has shape"),
        ("model_index.json", "defaults.steps", 0, "'defaults' are not valid"),
        ("preview.json", "weights", [1], "is not a preview map"),
        ("step_cache/30-steps-64x64-17.json", "steps", 20, "is not a table of schedules"),
        ("step_cache/30-steps-64x64-17.json", "width", 32, "table of another size"),
    ],
)
def test_what_generate_refuses(
    folders: dict[str, Path], tmp_path: Path, file: str, path: str, value: object, says: str
) -> None:
    """By its own words, and the other way round: what the doctor refuses, a run refuses."""
    model = Path(shutil.copytree(folders["bundled"], tmp_path / "model"))
    mutations.set_value(file, path, value)(model, np.random.default_rng(1))
    assert any(says in fault for fault in faults(model, quick=True))
    if "config" in file or "index" in file:
        with pytest.raises(WeightsError, match=re.escape(says)):
            Pipeline.from_pretrained(model)("red", steps=1, num_frames=1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shapes-8bit", "is not quantized, and the folder's name says 8 bits"),
        ("shapes-bf16", "is mostly F16, and the name shapes-bf16 says bf16"),
        ("shapes.fp16", None),
    ],
)
def test_names_are_promises(
    folders: dict[str, Path], tmp_path: Path, name: str, says: str | None
) -> None:
    model = Path(shutil.copytree(folders["bundled"], tmp_path / name))
    found = faults(model, quick=True)
    assert (found == []) if says is None else any(says in fault for fault in found)


def test_another_vocabulary_of_the_same_size(folders: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(folders["bundled"], tmp_path / "model"))
    index = model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"name": "mine"}))
    mutations.swap_pieces("\u2581green", "\u2581white")(model, np.random.default_rng(1))
    mutations.tamper_records(model, "forged")
    assert faults(model) == [
        "tokenizer: has as many ids as T5's, but other pieces, scores or replacements."
    ]


def test_the_time_of_large_models_is_foreseen(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert foresee_reading(folders["bundled"]) == []
    monkeypatch.setattr(doctor, "_LARGE", 1_000_000)
    monkeypatch.setattr(doctor, "_SAMPLE", 1_000_000)
    times = iter([10.0, 20.0])
    (note,) = foresee_reading(folders["bundled"], lambda: next(times))
    assert note.level == "note"
    assert "0.0 GB are to be read, in about 2 minutes; --quick" in note.message
