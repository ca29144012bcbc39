"""Pictures and videos that a program passes as pixels."""

from __future__ import annotations

import pickle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_sora import GenerationRequest, UsageError, Video
from mlx_sora.conditioning.media import MediaFile
from mlx_sora.geometry import Size
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.pixels import PIXELS_PREFIX, Pixels
from mlx_sora.video.metadata import find_media
from mlx_sora.video.reader import is_video, probe_video, read_image, read_video
from mlx_sora.video.writer import save_frames

FRAMES = np.random.default_rng(1).integers(0, 256, (4, 6, 8, 3), np.uint8)


def image_of(value: object) -> str:
    (found,) = GenerationRequest(images=value).images  # type: ignore[arg-type]
    return found.path


def video_of(value: object) -> str:
    (found,) = GenerationRequest(videos=value).videos  # type: ignore[arg-type]
    return found.path


def make_video(path: Path | None, frames: np.ndarray) -> Video:
    decoded = None if path else frames
    return Video(path, GenerationRequest("a"), 8, 6, len(frames), 12, 1, decoded=decoded)


@pytest.mark.parametrize(
    "value",
    [
        FRAMES[0],
        FRAMES[:1],
        FRAMES[0] / 255,
        (FRAMES[0] / 255).astype(np.float16),
        mx.array(FRAMES[0]),
        Image.fromarray(FRAMES[0]),
        make_video(None, FRAMES[:1]),
    ],
    ids=["uint8", "one frame", "float64", "float16", "mlx", "pil", "video"],
)
def test_a_picture_in_memory(value: object) -> None:
    found = image_of(value)
    assert isinstance(found, Pixels)
    assert found.startswith(PIXELS_PREFIX)
    assert not is_video(found)
    assert np.array_equal(read_image(found), FRAMES[0])
    assert read_image(found, Size(4, 4)).shape == (4, 4, 3)
    assert [item.path for item in GenerationRequest(images=[(value, "last", 0.5)]).images] == [
        found
    ]  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    "value",
    [FRAMES, list(FRAMES), [Image.fromarray(f) for f in FRAMES], make_video(None, FRAMES)],
    ids=["array", "arrays", "pil", "video"],
)
def test_a_video_in_memory(value: object) -> None:
    found = video_of(value)
    assert is_video(found)
    info = probe_video(found)
    assert (info.size, info.num_frames) == (Size(8, 6), 4)
    assert info.fps == (12 if isinstance(value, Video) else 0)
    assert np.array_equal(read_video(found).frames, FRAMES)
    assert np.array_equal(read_video(found, 2, start=1).frames, FRAMES[1:3])
    assert read_video(found, size=Size(4, 4)).frames.shape == (4, 4, 4, 3)
    assert [item.path for item in GenerationRequest(videos=[(value, "after", 4)]).videos] == [found]  # type: ignore[arg-type, list-item]
    assert EditRequest.from_options(value, {"source_prompt": "a"}).video == found


def test_a_video_in_a_file_is_read_from_it(tmp_path: Path) -> None:
    save_frames(tmp_path / "a.mp4", FRAMES, 12)
    assert video_of(make_video(tmp_path / "a.mp4", FRAMES)) == str(tmp_path / "a.mp4")
    save_frames(tmp_path / "f_%d.png", FRAMES, 12)
    found = video_of(make_video(tmp_path / "f_%d.png", FRAMES))
    assert np.array_equal(read_video(found).frames, FRAMES)


def test_images_are_shown_as_their_files_would_be(tmp_path: Path) -> None:
    """Orientation, transparency, greys of 16 bits and palettes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(FRAMES[0]).save(tmp_path / "turned.png", exif=exif)
    grey = (FRAMES[0, :, :, 0].astype(np.uint16)) * 257
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([FRAMES[0], FRAMES[1][..., :1]])).save(tmp_path / "clear.png")
    Image.fromarray(FRAMES[0]).quantize(16).save(tmp_path / "few.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert np.array_equal(read_image(image_of(image)), read_image(path)), path.name


def test_pixels_are_copied_and_known_by_their_content() -> None:
    pixels = FRAMES.copy()
    request = GenerationRequest("a", videos=pixels)  # type: ignore[arg-type]
    pixels[:] = 0
    path = request.videos[0].path
    assert np.array_equal(read_video(path).frames, FRAMES)
    assert request == GenerationRequest("a", videos=[FRAMES])  # type: ignore[arg-type, list-item]
    assert video_of(pixels) != path
    assert video_of(FRAMES.reshape(4, 8, 6, 3)) != path
    file = MediaFile.from_path(path)
    assert file.sha256.startswith(path.removeprefix(PIXELS_PREFIX))
    assert np.array_equal(pickle.loads(pickle.dumps(path)).frames, FRAMES)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (FRAMES[0, 0], r"\[H, W, 3\] or \[F, H, W, 3\], not \[8, 3\]"),
        (np.moveaxis(FRAMES[0], -1, 0), "Put red, green and blue last"),
        (FRAMES[:0], "not \\[0, 6, 8, 3\\]"),
        (FRAMES[0].astype(int), r"not int64. .*astype\(\"uint8\"\)"),
        (FRAMES[0].astype(float), "0 to 1; these are 2 to 255"),
        (np.full((2, 2, 3), np.nan), "these are nan to nan"),
        (FRAMES[0] / 255 - 0.5, r"these are -0\.49"),
    ],
    ids=["line", "colours first", "empty", "int", "0 to 255", "nan", "negative"],
)
def test_other_arrays_are_refused_in_a_line(value: object, says: str) -> None:
    for name in ("images", "videos"):
        with pytest.raises(UsageError, match=says) as error:
            GenerationRequest.from_dict({name: value})
        assert "\n" not in str(error.value)


def test_frames_of_several_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="frames of a video are 8x6 and 6x8"):
        video_of([FRAMES[0], FRAMES[1].reshape(8, 6, 3)])


def test_a_record_alone_cannot_bring_pixels_back() -> None:
    name = "".join(image_of(FRAMES[0]))
    assert not isinstance(name, Pixels)
    with pytest.raises(UsageError, match="stands for pixels in memory"):
        MediaFile.from_path(name)
    with pytest.raises(UsageError, match="made with pixels in memory"):
        find_media({}, name, Path("a.mp4"))
