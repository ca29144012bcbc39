"""Pictures and videos as they are read: modes, orientation, size, rate, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.reader import (
    ResizeCrop,
    image_size,
    is_video,
    probe_video,
    read_image,
    read_video,
    resize_and_crop,
)
from mlx_sora.video.writer import save_frames
from tests.helpers.media import shades, write_timed

RED, GREY = (200, 30, 60), (120, 120, 120)


def solid(colour: tuple[int, ...] | int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (6, 4), colour)


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (solid(RED), "a.png", RED),
        (solid(RED).quantize(), "a.gif", RED),
        (solid(120, "L"), "a.png", GREY),
        (solid((120, 255), "LA"), "a.png", GREY),
        (solid((*RED, 255), "RGBA"), "a.png", RED),
        (solid((200, 100, 50, 0), "RGBA"), "a.png", (0, 0, 0)),
        (solid((200, 100, 50, 51), "RGBA"), "a.webp", (40, 20, 10)),
        (solid((55, 225, 195, 0), "CMYK"), "a.jpg", RED),
        (Image.fromarray(np.full((4, 6), 120 * 257, np.uint16)), "a.png", GREY),
        (solid(1, "1"), "a.png", (255, 255, 255)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, image: Image.Image, name: str, expected: tuple[int, ...]
) -> None:
    lossless = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    image.save(tmp_path / name, quality=100, **lossless)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 8  # JPEG and the web palette


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    image = solid(RED)
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (6, 4, 3)
    assert pixels[0, 3].tolist() == [255, 255, 255]
    assert image_size(tmp_path / "a.png") == Size(4, 6)


@pytest.mark.parametrize(
    ("source", "size", "scaled"),
    [
        ((400, 300), (320, 180), (320, 240)),
        ((300, 400), (320, 180), (320, 427)),
        ((1920, 1080), (64, 64), (114, 64)),
        ((64, 64), (64, 64), (64, 64)),
        ((3, 2), (424, 240), (424, 283)),
    ],
)
def test_a_fit_just_covers_the_size(
    source: tuple[int, int], size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    fit = ResizeCrop.from_sizes(Size(*source), Size(*size))
    assert fit.scaled == scaled
    assert str(fit).startswith("{}x{}".format(*source))


def test_the_middle_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 31, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    # 21 columns are left over: pictures round the left part to even, videos down.
    assert read_image(tmp_path / "a.png", Size(10, 10)).min() == 255
    assert resize_and_crop(pixels[None], Size(10, 10)).min() == 255
    pixels[:, 10:20] = np.arange(10)[None, :, None]
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", Size(8, 10))[0, :, 0].tolist() == list(range(2, 10))


def test_videos_are_scaled_between_the_nearest_pixels() -> None:
    line = np.arange(0, 80, 10, dtype=np.uint8)
    frame = np.broadcast_to(line[None, :, None], (1, 4, 8, 3)).copy()
    smaller = resize_and_crop(frame, Size(4, 2))
    assert smaller[0, 0, :, 0].tolist() == [5, 25, 45, 65]
    larger = resize_and_crop(frame, Size(16, 8))
    assert larger[0, 0, :6, 0].tolist() == [0, 2, 8, 12, 18, 22]
    assert larger.shape == (1, 8, 16, 3)


def test_a_written_video_is_read_again(tmp_path: Path) -> None:
    frames = np.zeros((9, 16, 32, 3), np.uint8)
    frames[:] = RED
    path = save_frames(tmp_path / "a.mp4", frames, 12.5)
    assert is_video(path)
    assert probe_video(path).num_frames == 9
    assert probe_video(path).size == Size(32, 16)
    footage = read_video(path)
    assert footage.fps == pytest.approx(12.5)
    assert footage.frames.shape == frames.shape
    assert np.abs(footage.frames.astype(int) - frames).max() <= 4


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_part_of_a_video(tmp_path: Path, name: str) -> None:
    if name == "a.mkv":
        path = write_timed(tmp_path / name, shades(20), list(range(0, 80, 4)))
    else:
        path = save_frames(tmp_path / name, shades(20), 25)
    part = read_video(path, 5, start=10, size=Size(8, 8)).frames
    assert part.shape == (5, 8, 8, 3)
    assert np.abs(part[:, 4, 4].astype(int) - shades(20)[10:15, 0, 0]).max() <= 4
    assert len(read_video(path, 100, start=18).frames) == 2


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("this is no picture")


def missing(path: Path) -> None:
    pass


def truncated(path: Path) -> None:
    if path.suffix == ".mp4":
        save_frames(path, shades(30), 24)
    else:
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1200])


@pytest.mark.parametrize("damage", [empty, text, missing, truncated])
@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    damage(path)
    read = read_video if name.endswith("mp4") else read_image
    with pytest.raises(UsageError, match=name) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_sound_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(UsageError, match="No such file|is a folder"):
        read_video(tmp_path / "b.mp4")
    with av.open(str(tmp_path / "c.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UsageError, match="no video stream"):
        read_video(tmp_path / "c.mp4")


@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_a_video_without_frames_is_refused(tmp_path: Path, name: str) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"  # type: ignore[attr-defined]
        container.start_encoding()
    with pytest.raises(UsageError, match=f"{name}.*frames|Cannot read .*{name}") as error:
        read_video(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_variable_rate_becomes_constant(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.mp4", shades(7), [0, 4, 8, 12, 40, 44, 48])
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (13, pytest.approx(25))
    assert "variable frame rate, read as 13 frames at 25 fps" in info.notes[0]
    frames = read_video(path).frames[:, 8, 8, 0].astype(int)
    expected = shades(7)[:, 0, 0, 0].astype(int)[[0, 1, 2, *[3] * 7, 4, 5, 6]]
    assert np.abs(frames - expected).max() <= 3
    part = read_video(path, 4, start=8, info=info).frames[:, 8, 8, 0].astype(int)
    assert np.abs(part - expected[8:12]).max() <= 3
    jitter = write_timed(tmp_path / "b.mp4", shades(6), [0, 4, 9, 12, 16, 20])
    assert probe_video(jitter).fps == pytest.approx(25)
    assert not probe_video(jitter).notes


def test_frames_beyond_the_end(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.mp4", shades(5), 24)
    with pytest.raises(UsageError, match="5 frames, none from number 5"):
        read_video(path, start=5)


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UsageError, match="floating-point"):
        read_image(tmp_path / "a.tiff")
