"""The file of a run's checkpoint: what goes in comes out, and nothing that is not whole does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.errors import MlxSoraError, UsageError, WeightsError
from mlx_sora.pipeline.checkpoint import Snapshot, read_record
from mlx_sora.video.output_path import CHECKPOINT_SUFFIX, checkpoint_path

Z = mx.random.normal((1, 2, 3, 4, 4), key=mx.random.key(0))
SNAPSHOT = Snapshot(
    {"prompt": "ä", "seed": 3},
    {"steps": 30},
    "a.mp4",
    finished=(Z, Z + 1),
    accounts=({"lpl": {"leapt": True}}, {}),
    latents=Z * 2,
    steps=7,
    state={
        "sampler": {"v": Z.astype(mx.bfloat16), "none": None, "numbers": [0.1, [True, -1]]},
        "policy": {"mask": mx.array([[True, False]]), "rows": {"0": {"sums": [{"t": mx.ones(1)}]}}},
    },
    warnings=("one",),
    resumed=({"clip": 0, "step": 2},),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path / "a.mp4")
    SNAPSHOT.save(path)
    return path


def alike(a: object, b: object) -> bool:
    """Equal, arrays in value, type and shape."""
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all().item())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def test_what_goes_in_comes_out(file: Path) -> None:
    assert [file] == list(file.parent.iterdir())
    assert file.name == "a.mp4" + CHECKPOINT_SUFFIX
    found = Snapshot.load(file)
    assert alike(vars(found), vars(SNAPSHOT))
    assert found.clip == 2
    assert read_record(file)["request"] == SNAPSHOT.request


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    Snapshot({}, {}, "a.mp4").save(tmp_path / "a")
    found = Snapshot.load(tmp_path / "a")
    assert (found.clip, found.steps, found.latents, found.state) == (0, 0, None, None)


def test_it_takes_the_place_of_the_one_before(file: Path) -> None:
    replace(SNAPSHOT, steps=8).save(file)
    assert Snapshot.load(file).steps == 8
    assert [file] == list(file.parent.iterdir())


def test_every_cut_and_every_flipped_byte_is_found(file: Path) -> None:
    whole = file.read_bytes()
    for at in [*range(0, 400, 13), *range(400, len(whole), 211), len(whole) - 1]:
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises((WeightsError, UsageError)) as caught:
                Snapshot.load(file)
            assert str(file) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path, file: Path) -> None:
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": Z})
    for path, error, says in (
        (tmp_path / "gone", UsageError, "No such"),
        (tmp_path, UsageError, "is a folder"),
        (tmp_path / "other.safetensors", UsageError, "not a checkpoint"),
        (Path(__file__), WeightsError, "damaged"),
    ):
        with pytest.raises(error, match=says):
            Snapshot.load(path)


def test_a_newer_format_is_refused_by_name(file: Path) -> None:
    mx.save_safetensors(str(file), {"x": Z}, metadata={"format": "9", "record": "{}", "sha256": ""})
    with pytest.raises(UsageError, match="format 9"):
        Snapshot.load(file)


def test_a_folder_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MlxSoraError, match="Cannot write"):
        SNAPSHOT.save(tmp_path / "file" / "a")
