"""What cannot be written is found before the work, in one line."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, features

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.cli.main import main
from mlx_sora.request.edit import EditRequest
from mlx_sora.runtime.events import RequestFailed
from mlx_sora.utils.files import partial_name
from mlx_sora.utils.obstacles import check_result_file
from mlx_sora.video import output_path
from mlx_sora.video.encoders import missing_encoder
from mlx_sora.video.output_path import (
    OutputNames,
    check_inputs,
    check_output,
    complete_path,
)
from mlx_sora.video.writer import open_writer, save_frames
from tests.unit.video.test_faults import files_up_to

PICTURE = np.zeros((1, 64, 64, 3), np.uint8)


def request(output: Path, **options: object) -> GenerationRequest:
    values = {"prompt": "red", "steps": 1, "num_frames": 1, "seed": 1, "output": str(output)}
    return GenerationRequest.from_dict({**values, **options})


def refusal(pipe: Pipeline, output: Path, **options: object) -> str:
    """Return the error of a request that is refused before any work."""
    with pytest.raises(UsageError) as caught:
        pipe.stream(request(output, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_av_without_an_encoder_of_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str, mode: str) -> None:
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr("av.Codec", unknown)
    missing_encoder.cache_clear()
    with pytest.raises(UsageError, match=r"libx264.*Write \.gif, \.webp, \.png .*install av"):
        check_output(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match=r"VP9 encoder \(libvpx-vp9\)"):
        check_output(tmp_path / "a.webm")
    check_output(tmp_path / "a.webp")
    monkeypatch.setattr(features, "check", lambda name: False)
    missing_encoder.cache_clear()
    with pytest.raises(UsageError, match=r"WebP.*Write \.gif, \.png .*install pillow"):
        check_output(tmp_path / "a.webp")
    missing_encoder.cache_clear()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a" * 240 + ".png", {"checkpoint_every": 1}),
        ("a" * 245 + ".png", {"preview_every": 1}),
        ("a" * 251 + ".png", {"metadata": True}),
        ("a" * 245 + "%09d.png", {"num_frames": 17}),
    ],
)
def test_names_that_are_too_long(
    pipe: Pipeline, tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    assert "is too long" in refusal(pipe, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_only_its_temporary_name_makes_too_long(tmp_path: Path) -> None:
    folder, length = tmp_path, os.pathconf(tmp_path, "PC_PATH_MAX") - 40
    while len(os.fsencode(folder)) < length - 20:
        (folder := folder / ("d" * min(200, length - len(os.fsencode(folder))))).mkdir()
    with pytest.raises(UsageError, match="is too long"):
        check_output(folder / "a.png")


def test_the_longest_name_can_be_written_and_its_free_name_too(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    check_output(path)
    with open_writer(path, 64, 64, 8) as writer:
        writer.write(PICTURE)
        path.write_text("precious")
    assert path.read_text() == "precious"
    assert Image.open(writer.path).size == (64, 64)


@pytest.mark.parametrize(
    ("beside", "options"),
    [
        ("a.json", {"metadata": True}),
        ("a.png.checkpoint.safetensors", {"checkpoint_every": 1}),
        ("a.preview.png", {"preview_every": 1}),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
def test_what_lies_under_the_names_of_other_files(
    pipe: Pipeline, tmp_path: Path, beside: str, options: dict[str, object], kind: str
) -> None:
    place(tmp_path / beside, kind)
    found = refusal(pipe, tmp_path / "a.png", overwrite=True, **options)
    assert found.startswith(f"{tmp_path / beside} is a {kind.rpartition(' ')[2]}")


def place(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("missing/a.png")


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
def test_what_lies_under_the_name_of_the_output(tmp_path: Path, kind: str) -> None:
    place(tmp_path / "a.png", kind)
    place(tmp_path / "pipe", "pipe")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=f"a.png is a {kind.rpartition(' ')[2]}"):
            check_output(tmp_path / "a.png", overwrite)
        with pytest.raises(UsageError, match="pipe or a device"):
            check_output(complete_path(str(tmp_path / "pipe"), 17), overwrite)


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/null"])
def test_streams_and_devices(capsys: pytest.CaptureFixture[str], name: str) -> None:
    for frames in ("1", "17"):
        assert main(["generate", "-p", "red", "--num-frames", frames, "-o", name, "--quiet"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "written to a file" in line


@pytest.mark.parametrize("output", ["away/a.png", "away/f_%d.png", "away/new/f_%d.png"])
def test_folders_that_are_broken_links(tmp_path: Path, output: str) -> None:
    (tmp_path / "away").symlink_to("missing")
    with pytest.raises(UsageError, match="away is a link to missing, which does not exist"):
        check_output(tmp_path / output)


def test_a_link_to_a_file_is_replaced(tmp_path: Path) -> None:
    link, target = tmp_path / "a.png", tmp_path / "target.png"
    target.write_text("precious")
    link.symlink_to(target)
    with pytest.raises(UsageError, match="exists already"):
        save_frames(link, PICTURE, 8)
    save_frames(link, PICTURE, 8, overwrite=True)
    assert not link.is_symlink()
    assert target.read_text() == "precious"


def test_a_disk_without_room_for_anything(tmp_path: Path) -> None:
    with files_up_to(1000), pytest.raises(UsageError, match="Cannot write into .*large.*ulimit"):
        check_output(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_commands(tmp_path: Path) -> None:
    check_result_file(tmp_path / "new" / "folder" / "table.json")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is not a folder"):
        check_result_file(tmp_path / "file" / "table.json")
    with pytest.raises(UsageError, match="is a folder"):
        check_result_file(tmp_path)
    with files_up_to(0), pytest.raises(UsageError, match="Cannot write into"):
        check_result_file(tmp_path / "table.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_calibrate_looks_at_its_table_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["calibrate", "-p", "red", "--model", "shapes", "--steps", "900"]
    assert main([*words, "-o", str(tmp_path / "file" / "table.json")]) == 2
    assert "file is not a folder" in capsys.readouterr().err
    assert main([*words, "--material", "a.png"]) == 2
    assert "--material is for --preview. Add --preview" in capsys.readouterr().err
    (tmp_path / "table.json").write_text("precious")
    for task in (["-p", "red", "--steps", "900"], ["--preview"]):
        more = ["--model", "shapes", "-o", str(tmp_path / "table.json")]
        assert main(["calibrate", *task, *more]) == 2
        assert "exists already. Give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "table.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("first", "second", "folded", "sidecar"),
    [
        ("a.png", "A.png", True, False),
        ("u\u0308.png", "\u00fc.png", True, False),
        ("a.png", "a.gif", False, True),
        ("f_%02d.png", "f_%03d.png", False, False),
        ("f_%d.png", "F_%d.png", True, False),
    ],
)
def test_videos_of_a_batch_that_collide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    folded: bool,
    sidecar: bool,
) -> None:
    names = OutputNames()
    names.add(tmp_path / first, sidecar=sidecar)
    names.add(tmp_path / "other.png", sidecar=sidecar)
    if folded:
        names.add(tmp_path / second, sidecar=sidecar)  # this file system tells them apart
        monkeypatch.setattr(output_path, "_ignores_case", lambda folder: True)
        second = second.upper().replace("%D", "%d")
    with pytest.raises(UsageError, match="one file"):
        names.add(tmp_path / second, sidecar=sidecar)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_refuses_the_second_of_two_sidecars(pipe: Pipeline, tmp_path: Path) -> None:
    requests = [request(tmp_path / name, metadata=True) for name in ("a.png", "a.gif")]
    events = list(pipe.stream_all(requests))
    (failed,) = (event for event in events if isinstance(event, RequestFailed))
    assert failed.index == 1
    assert "one file" in str(failed.error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_an_output_that_is_an_input(pipe: Pipeline, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    save_frames(picture, PICTURE, 8)
    before = picture.read_bytes()
    same = refusal(pipe, picture, images=[[str(picture), 0, 0.5]], overwrite=True)
    assert same == f"{picture} is also an input, which the output would replace. " + (
        "Give another output."
    )
    assert "also an input" in refusal(
        pipe, tmp_path / "%d.png", images=[str(link(tmp_path))], overwrite=True, num_frames=17
    )
    edit = EditRequest.from_options(
        str(picture),
        {"prompt": "b", "source_prompt": "a", "output": str(picture), "overwrite": True},
    )
    with pytest.raises(UsageError, match="also an input"):
        pipe.stream_edit(edit)
    check_inputs(tmp_path / "b.png", [picture])
    assert picture.read_bytes() == before


def link(folder: Path) -> Path:
    """Return a link to a frame."""
    save_frames(folder / "%d.png", PICTURE, 8)
    (folder / "link.png").symlink_to("0.png")
    return folder / "link.png"


def test_temporary_names_are_short() -> None:
    assert len(partial_name(Path("a" * 300)).name) < 100
