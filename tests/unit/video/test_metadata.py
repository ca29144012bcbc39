"""The record: built, read back, replayed, and refused where it is not ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.video import Video
from mlx_sora.video.metadata import (
    build_metadata,
    find_media,
    read_metadata,
    replay_options,
    without_folders,
)
from mlx_sora.video.reader import read_image
from mlx_sora.video.writer import save_frames

SETTINGS = {
    "model": "shapes",
    "seed": 7,
    "steps": 30,
    "guidance": 7.0,
    "sampler": "rflow",
    "fps": 24,
    "aesthetic": None,
    "motion": None,
    "camera": None,
    "width": 64,
    "height": 64,
    "num_frames": 17,
}


def test_record_holds_request_settings_versions_and_costs() -> None:
    request = GenerationRequest(prompt="a", seed=7)
    record = build_metadata(
        request, SETTINGS, warnings=["w"], seconds={"encode": 1.23456}, peak_memory={"encode": 5}
    )
    assert record["request"] == {"prompt": "a", "seed": 7}
    assert record["settings"] == SETTINGS
    assert record["warnings"] == ["w"]
    assert record["seconds"] == {"encode": 1.235}
    assert record["peak_memory"] == {"encode": 5}
    assert {"mlx-sora", "python", "mlx", "av"} <= record["versions"].keys()
    assert json.loads(json.dumps(record)) == record


def test_replay_takes_what_was_decided() -> None:
    asked = {"prompt": "a", "resolution": "144p", "output": "x.mp4", "overwrite": True, "fps": 12.0}
    chosen = replay_options({"request": asked, "settings": SETTINGS | {"fps": 12.0}})
    request = GenerationRequest.from_dict(chosen)
    request.validate()
    assert (request.seed, request.steps, request.width, request.height) == (7, 30, 64, 64)
    assert (request.fps, request.model) == (12.0, "shapes")
    assert (request.resolution, request.output, request.overwrite) == (None, None, False)


def test_replay_keeps_the_model_that_was_asked_for() -> None:
    """Settings hold a model's name; only the request knows the path it was given by."""
    asked = {"prompt": "a", "model": "some/folder"}
    assert replay_options({"request": asked, "settings": SETTINGS})["model"] == "some/folder"


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"request": 5},
        {"request": []},
        {"request": {"prompt": "a"}, "settings": 3},
        {"request": {"prompt": "a", "teleport": True}},
        {"request": {"prompt": 5}},
        {"request": {"prompt": "a", "seed": [1, 2]}},
        {"request": {"prompt": "a"}, "settings": {"steps": {"$gt": 0}}},
        {"request": {"prompt": "a"}, "settings": {"steps": float("nan")}},
        {"request": {"prompt": "a"}, "settings": {"seed": 10**500}},
    ],
)
def test_foreign_and_hostile_records_are_usage_errors(record: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        GenerationRequest.from_dict(replay_options(record, "x.mp4")).validate()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.json", "a.gif", "a.webp", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe" * 50, b"[" * 100_000, b"null", b"5"])
def test_what_is_not_a_record_is_a_usage_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_metadata(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["hello", "[1]", '{"a": ' * 5000, "9" * 9000, "x" * (1 << 21)])
def test_foreign_comments_are_usage_errors(tmp_path: Path, text: str) -> None:
    with Image.new("RGB", (8, 8)) as image:
        image.save(tmp_path / "a.gif", comment=text.encode())
    (tmp_path / "a.json").write_text(text)
    for name in ("a.gif", "a.json"):
        with pytest.raises(UsageError, match="not a record|no metadata"):
            read_metadata(tmp_path / name)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "no.mp4", tmp_path):
        with pytest.raises(UsageError, match="No such file|is a folder"):
            read_metadata(path)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    """A cut file either still tells its record or says that it cannot be read."""
    record = {"request": {"prompt": "a"}}
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    for name in ("a.mp4", "a.webp"):
        path = save_frames(tmp_path / name, frames, 24, record)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        try:
            found = read_metadata(path)
        except UsageError:
            found = record
        assert found == record


def make_video(frames: np.ndarray | None, path: Path | None = None, **more: object) -> Video:
    request = GenerationRequest.from_dict({"prompt": "a", **more})
    return Video(path, request, 16, 8, 3, 24, 1, metadata={"request": {}}, decoded=frames)


def test_video_saves_frames_it_kept(tmp_path: Path) -> None:
    frames = np.arange(3 * 8 * 16 * 3, dtype=np.uint8).reshape(3, 8, 16, 3)
    video = make_video(frames)
    for name in ("a.mp4", "a.gif", "a.webp"):
        assert video.save(tmp_path / name) == tmp_path / name
        assert read_metadata(tmp_path / name) == {"request": {}}
    with pytest.raises(UsageError, match="exists already"):
        video.save(tmp_path / "a.mp4")
    video.save(tmp_path / "a.mp4", overwrite=True)
    with pytest.raises(UsageError, match="one frame"):
        video.save(tmp_path / "a.png")


def test_video_keeps_its_request_to_itself_when_told_so(tmp_path: Path) -> None:
    make_video(np.zeros((3, 8, 16, 3), np.uint8), embed_metadata=False).save(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="has no metadata"):
        read_metadata(tmp_path / "a.mp4")


def test_a_written_video_can_be_copied_and_converted(tmp_path: Path) -> None:
    source = save_frames(tmp_path / "a.mp4", np.zeros((3, 8, 16, 3), np.uint8), 24)
    video = make_video(None, source)
    copy = video.save(tmp_path / "b.mp4")
    assert copy.read_bytes() == source.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        video.save(tmp_path / "b.mp4")
    for name in ("b.gif", "b.webp", "b_%d.png"):
        assert video.save(tmp_path / name) == tmp_path / name
        assert read_metadata(tmp_path / name.replace("%d", "0")) == {"request": {}}
    assert read_image(tmp_path / "b_2.png").max() <= 1
    with pytest.raises(UsageError, match="one frame"):
        video.save(tmp_path / "b.png")


def test_media_are_found_beside_the_record_if_their_content_is_the_same(tmp_path: Path) -> None:
    same, other = tmp_path / "same.png", tmp_path / "other.png"
    same.write_bytes(b"a")
    other.write_bytes(b"b")
    checksum, source = hashlib.sha256(b"a").hexdigest(), tmp_path / "video.mp4"
    media = [{"path": name, "sha256": checksum} for name in ("same.png", "other.png", "gone.png")]
    record = {"settings": {"media": media}}
    assert find_media(record, "same.png", source) == str(same)
    # Records of earlier versions have whole paths.
    old = {"settings": {"media": [{"path": str(same), "sha256": checksum}]}}
    assert find_media(old, str(same), Path("elsewhere/video.mp4")) == str(same)
    with pytest.raises(UsageError, match=r"other.png is not the file that .*video.mp4 was made"):
        find_media(record, "other.png", source)
    with pytest.raises(UsageError, match=r"gone.png, which .* was made with, is not beside it"):
        find_media(record, "gone.png", source)
    for strange in ({"settings": {"media": [3, {"path": 1}]}}, {"settings": {"media": 3}}, {}):
        with pytest.raises(UsageError, match="is not the file"):
            find_media(strange, "same.png", source)


def test_folders_are_left_out_wherever_they_stand() -> None:
    record = {"a": ["/home/ann/x.png", 3], "b": {"c": "read /home/ann/x.png, not x.png"}, "d": None}
    expected = {"a": ["x.png", 3], "b": {"c": "read x.png, not x.png"}, "d": None}
    assert without_folders(record, ["/home/ann/x.png", "x.png", ""]) == expected
    assert without_folders({"output": "/home/ann/frames/"}, ["/home/ann/frames/"]) == {
        "output": "frames"
    }
