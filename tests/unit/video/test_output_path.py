"""Where a video may go, decided before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_sora.errors import UsageError
from mlx_sora.video.output_path import (
    check_output,
    existing_files,
    frame_path,
    is_sequence,
    output_path,
    sidecar_path,
)
from mlx_sora.video.output_template import fill_template, slug


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, moving right!", "a-red-circle-moving-right"),
        ("../../etc/passwd", "etc-passwd"),
        ("снег идёт", "снег-идёт"),
        ("...", "video"),
        ("word " * 40, ("word-" * 10)[:48].strip("-")),
    ],
)
def test_slug(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_templates() -> None:
    filled = fill_template("{index:03d}_{seed}-{prompt_slug}{{}}", prompt="A b", seed=9, index=2)
    assert filled == "002_9-a-b{}"


@pytest.mark.parametrize(
    "template", ["{nope}.mp4", "{seed", "{}", "{0}", "{seed.real}", "{seed[0]}", "{seed:q}"]
)
def test_templates_that_cannot_be_filled(template: str) -> None:
    with pytest.raises(UsageError, match=r"\{seed\}, \{index\}, \{prompt_slug\}"):
        fill_template(template, prompt="a", seed=1)


@pytest.mark.parametrize(
    ("template", "num_frames", "expected"),
    [
        ("a.mp4", 1, "a.mp4"),
        ("a", 17, "a.mp4"),
        ("a", 1, "a.png"),
        ("a.GIF", 17, "a.GIF"),
        ("frames/", 17, "frames/frame_%05d.png"),
        ("x_%03d.png", 17, "x_%03d.png"),
    ],
)
def test_output_path(template: str, num_frames: int, expected: str) -> None:
    assert output_path(template, prompt="p", seed=1, num_frames=num_frames) == Path(expected)


def test_sequences() -> None:
    assert is_sequence(Path("a_%04d.png"))
    assert is_sequence(Path("a_%d.png"))
    assert not is_sequence(Path("100%.png"))
    assert frame_path(Path("100%_%04d.png"), 7) == Path("100%_0007.png")
    assert frame_path(Path("%d.png"), 12) == Path("12.png")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("d/clip.mp4", "d/clip.json"),
        ("d/clip_%04d.png", "d/clip.json"),
        ("d/%04d.png", "d/metadata.json"),
        ("d/frame_%05d.png", "d/frame.json"),
    ],
)
def test_sidecar_path(path: str, expected: str) -> None:
    assert sidecar_path(Path(path)) == Path(expected)


def test_a_new_file_is_fine_and_nothing_is_left(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif", "a.webp", "a.png", "a_%02d.png", "new/f_%02d.png"):
        check_output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_clobbered(tmp_path: Path) -> None:
    for name in ("a.mp4", "b_007.png", "c.json"):
        (tmp_path / name).write_text("precious")
    for name, sidecar in (("a.mp4", False), ("b_%03d.png", False), ("c.mp4", True)):
        with pytest.raises(
            UsageError, match="(exists already|first frame is missing).*--overwrite"
        ):
            check_output(tmp_path / name, sidecar=sidecar)
        check_output(tmp_path / name, True, sidecar=sidecar)
    check_output(tmp_path / "c.mp4")
    assert existing_files(tmp_path / "b_%03d.png") == [tmp_path / "b_007.png"]
    assert {file.read_text() for file in tmp_path.iterdir()} == {"precious"}


def test_impossible_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for path, message in (
        (tmp_path / "file" / "a.mp4", "is not a folder"),
        (tmp_path / "file" / "new" / "f_%d.png", "is not a folder"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / "a.avi", ".mp4, .mov, .webm, .gif, .webp, .png"),
        (tmp_path / "a", "Unknown output format"),
        (tmp_path / "a_%02d.mp4", "only png"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write into")
def test_unwritable_folder() -> None:
    with pytest.raises(UsageError, match="Cannot write into /proc"):
        check_output("/proc/a.mp4")


def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(UsageError, match="Cannot write into"):
            check_output(tmp_path / "a.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="even sides, not 63x64"):
        check_output(tmp_path / "a.mp4", size=(63, 64))
    with pytest.raises(UsageError, match="at most 50"):
        check_output(tmp_path / "a.gif", fps=60)
    with pytest.raises(UsageError, match="one frame, not 17"):
        check_output(tmp_path / "a.png", num_frames=17)
    check_output(tmp_path / "a.webp", size=(63, 64), fps=60, num_frames=17)
    check_output(tmp_path / "a_%d.png", num_frames=17)
    check_output(tmp_path / "a.png", num_frames=1)
