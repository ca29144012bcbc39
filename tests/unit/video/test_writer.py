"""Files that come out: true colours, tags, whole or absent, never over another."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.video.encoders import rgb_to_yuv420
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.output_path import check_output, checkpoint_path, frame_path
from mlx_sora.video.reader import probe_video, read_image, read_video
from mlx_sora.video.writer import open_writer, save_frames, write_sidecar

COLORS = [
    (0, 0, 0),
    (255, 255, 255),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 0, 255),
    (0, 255, 255),
    (200, 120, 40),
    (17, 130, 201),
    (128, 128, 128),
    (250, 190, 212),
]
KINDS = ("a.mp4", "a.mov", "a.webm", "a.gif", "a.webp", "a_%03d.png")


def patches(size: int = 32) -> np.ndarray:
    """One flat square per colour, in a row: uint8 [size, size * colours, 3]."""
    tiles = [np.full((size, size, 3), color, np.uint8) for color in COLORS]
    return np.concatenate(tiles, axis=1)


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A square that moves: uint8 [F, H, W, 3]."""
    video = np.full((frames, height, width, 3), 30, np.uint8)
    for i in range(frames):
        video[i, 8:16, 2 * i : 2 * i + 8] = (220, 40, 90)
    return video


def waves(frames: int, height: int, width: int) -> np.ndarray:
    """Coloured waves with grain: uint8 [F, H, W, 3]."""
    t, y, x = np.ogrid[:frames, :height, :width]
    shade = np.sin(6 * x / width + t / 4) + np.cos(5 * y / height - t / 7)
    grain = np.random.default_rng(3).normal(0, 2, (frames, height, width, 3))
    return (127 + np.stack([60 * shade, 50 * shade[:, ::-1], 40 * shade], -1) + grain).astype("u1")


def decode(path: Path) -> np.ndarray:
    """mp4 -> frames by the inverse of BT.709 limited range, written apart from the code."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            assert frame.format.name == "yuv420p"
            planes = frame.to_ndarray().astype(float)
            height, width = frame.height, frame.width
            flat = planes.ravel()
            area = height * width
            y = (flat[:area].reshape(height, width) - 16) / 219
            cb, cr = (flat[area:].reshape(2, height // 2, width // 2) - 128) / 224
            cb, cr = (c.repeat(2, 0).repeat(2, 1) for c in (cb, cr))
            red, blue = y + 1.5748 * cr, y + 1.8556 * cb
            green = y - 0.4681 * cr - 0.1873 * cb
            frames.append(np.stack([red, green, blue], -1).clip(0, 1) * 255)
    return np.stack(frames)


def middles(picture: np.ndarray, size: int = 32) -> np.ndarray:
    return picture[size // 2, size // 2 :: size].astype(float)


def test_mp4_colours_are_true(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.mp4", np.stack([patches()] * 20), 24)
    decoded = decode(path)
    assert len(decoded) == 20
    for frame in decoded:
        assert np.abs(middles(frame) - COLORS).max() <= 3


def test_mp4_colours_are_true_to_a_player_that_reads_the_tags(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.mp4", patches()[None], 24)
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        source = graph.add_buffer(template=container.streams.video[0])
        # FFmpeg's own conversion, which goes by what the frame is tagged as.
        convert = graph.add("scale", "flags=accurate_rnd+full_chroma_int")
        graph.link_nodes(source, convert, graph.add("format", "gbrp"), graph.add("buffersink"))
        graph.configure()
        graph.push(next(container.decode(video=0)))
        shown = graph.pull().to_ndarray(format="rgb24")
    assert np.abs(middles(shown) - COLORS).max() <= 3


def test_mp4_tags_rate_and_layout(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.mp4", clip(34), 23.976)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc) == (1, 1)
        assert (context.colorspace, context.color_range) == (1, 1)
        assert (context.pix_fmt, context.name) == ("yuv420p", "h264")
        assert (stream.width, stream.height, stream.frames) == (48, 32, 34)
        assert float(stream.average_rate or 0) == pytest.approx(23.976, abs=1e-3)
        times = [frame.time for frame in container.decode(video=0)]
    assert np.allclose(times, np.arange(34) / 23.976, atol=1e-3)
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize(("kind", "codec"), [("mov", "h264"), ("webm", "vp9")])
def test_other_films_have_the_colours_rate_and_bytes_of_mp4(
    tmp_path: Path, kind: str, codec: str
) -> None:
    frames = np.stack([patches()] * 18)
    paths = [save_frames(tmp_path / f"{i}.{kind}", frames, 23.976, {"a": 1}) for i in range(5)]
    assert len({path.read_bytes() for path in paths}) == 1
    assert np.abs([middles(frame) - COLORS for frame in decode(paths[0])]).max() <= 3
    with av.open(str(paths[0])) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc) == (1, 1)
        assert (context.colorspace, context.color_range, context.name) == (1, 1, codec)
    info, found = probe_video(paths[0]), read_video(paths[0])
    assert (info.size, info.num_frames) == ((384, 32), 18)
    assert info.fps == pytest.approx(23.976, abs=1e-4), "times of Matroska are milliseconds"
    assert np.abs([middles(frame) - COLORS for frame in found.frames]).max() <= 3


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a_%d.png"])
def test_frames_are_enlarged_to_equal_pixels(tmp_path: Path, name: str) -> None:
    frames = clip()
    with open_writer(tmp_path / name, 48, 32, 24, scale=3) as writer:
        writer.write(frames)
    if name == "a_%d.png":
        found = np.stack([read_image(frame_path(tmp_path / name, i)) for i in range(5)])
        assert np.array_equal(found, frames.repeat(3, 1).repeat(3, 2))
    found = read_video(tmp_path / name).frames if name != "a_%d.png" else found
    assert found.shape == (5, 96, 144, 3)


@pytest.mark.parametrize("size", [32, 80])
def test_a_hundred_encodings_of_equal_frames_are_one_file(tmp_path: Path, size: int) -> None:
    frames = waves(17, size, size)
    files = {save_frames(tmp_path / "a.mp4", frames, 24, overwrite=True).read_bytes()}
    for count in range(99):
        noise = [bytearray(1 + 997 * count % 90_000) for _ in range(count % 7)]  # other addresses
        files.add(save_frames(tmp_path / "a.mp4", frames, 24, overwrite=True).read_bytes())
        del noise
    assert len(files) == 1


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_other_formats_repeat_too(tmp_path: Path, name: str) -> None:
    frames = waves(1 if name == "a.png" else 5, 48, 48)
    files = {
        save_frames(tmp_path / name, frames, 24, overwrite=True).read_bytes() for _ in range(20)
    }
    assert len(files) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of cores")
def test_the_number_of_cores_does_not_change_a_file(tmp_path: Path) -> None:
    frames, cores = waves(9, 240, 96), os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("one core")
    all_cores = save_frames(tmp_path / "all.mp4", frames, 24).read_bytes()
    os.sched_setaffinity(0, {min(cores)})
    try:
        one_core = save_frames(tmp_path / "one.mp4", frames, 24).read_bytes()
    finally:
        os.sched_setaffinity(0, cores)
    assert one_core == all_cores


def test_luma_and_chroma_of_known_colours() -> None:
    """Reference points of BT.709 limited range, from the standard."""
    for color, expected in (
        ((0, 0, 0), (16, 128, 128)),
        ((255, 255, 255), (235, 128, 128)),
        ((255, 0, 0), (63, 102, 240)),
        ((0, 0, 255), (32, 240, 118)),
    ):
        planes = rgb_to_yuv420(np.full((4, 6, 3), color, np.uint8))
        assert planes.shape == (6, 6)
        flat = planes.ravel()
        assert (set(flat[:24]), set(flat[24:30]), set(flat[30:])) == (
            {expected[0]},
            {expected[1]},
            {expected[2]},
        )


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (90, 160), (240, 424)])
def test_mp4_of_awkward_even_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.full((3, *size, 3), (40, 160, 90), np.uint8)
    decoded = decode(save_frames(tmp_path / "a.mp4", frames, 24))
    assert decoded.shape == frames.shape
    assert np.abs(decoded - frames).max() <= 3


def test_frames_may_come_in_pieces(tmp_path: Path) -> None:
    video = clip(40)
    with open_writer(tmp_path / "a.mp4", 48, 32, 24) as writer:
        for start in range(0, 40, 17):
            writer.write(video[start : start + 17])
    whole = save_frames(tmp_path / "b.mp4", video, 24)
    assert writer.num_frames == 40
    assert (decode(writer.path) == decode(whole)).all()


def test_png_and_sequences_are_exact(tmp_path: Path) -> None:
    video = clip(4)
    save_frames(tmp_path / "one.png", video[:1], 24)
    save_frames(tmp_path / "new" / "f_%02d.png", video, 24)
    assert (np.asarray(Image.open(tmp_path / "one.png")) == video[0]).all()
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["f_00.png", "f_01.png", "f_02.png", "f_03.png"]
    assert (np.stack([np.asarray(Image.open(file)) for file in files]) == video).all()


def play(path: Path) -> tuple[list[int], list[np.ndarray]]:
    """Milliseconds and pictures of an animation; an equal successor may be merged into one."""
    with Image.open(path) as image:
        times, frames = [], []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            times.append(int(image.info["duration"]))
    return times, frames


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_keep_time_and_colour(tmp_path: Path, kind: str) -> None:
    video = clip(15)
    times, frames = play(save_frames(tmp_path / f"a.{kind}", video, 24))
    assert len(frames) == 15
    assert sum(times) == pytest.approx(1000 * 15 / 24, abs=5)
    assert max(times) - min(times) <= 10
    tolerance = 4 if kind == "gif" else 12
    inside = np.stack([frames[i][12, 2 * i + 4].astype(float) for i in range(15)])
    assert np.abs(inside - (220, 40, 90)).max() <= tolerance


@pytest.mark.parametrize("name", KINDS)
def test_the_last_metadata_is_recorded(tmp_path: Path, name: str) -> None:
    record = {"request": {"prompt": 'é "снег"\n\0', "n": 1.5}, "long": "x" * 70_000}
    with open_writer(tmp_path / name, 48, 32, 24, {"early": True}) as writer:
        writer.write(clip())
        writer.metadata = record
    assert read_metadata(min(tmp_path.iterdir())) == record


@pytest.mark.parametrize("name", KINDS)
def test_without_metadata_nothing_is_recorded(tmp_path: Path, name: str) -> None:
    save_frames(tmp_path / name, clip(), 24)
    with pytest.raises(UsageError, match="has no metadata"):
        read_metadata(min(tmp_path.iterdir()))


def write_and_stop(path: Path, error: type[BaseException], overwrite: bool = False) -> None:
    """A run that fails after nine frames."""
    with open_writer(path, 48, 32, 24, overwrite=overwrite) as writer:
        writer.write(clip(9))
        raise error


@pytest.mark.parametrize("name", [*KINDS, "new/a_%d.png", "new/deep/a.mp4"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        write_and_stop(tmp_path / name, error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*KINDS, "a.png"])
def test_an_interruption_while_closing_leaves_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_sora.video.writer.rename_into_place", interrupt)
    monkeypatch.setattr("mlx_sora.video.writer.frame_path", interrupt)
    frames = clip(1) if name == "a.png" else clip()
    with pytest.raises(KeyboardInterrupt):
        save_frames(tmp_path / name, frames, 24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", KINDS)
def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path: Path, name: str) -> None:
    save_frames(tmp_path / name, clip(), 24)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(tmp_path / name, KeyboardInterrupt, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_no_frames_no_file(tmp_path: Path) -> None:
    with pytest.raises(MlxSoraError, match="No frame"), open_writer(tmp_path / "a.mp4", 8, 8, 24):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", KINDS)
def test_existing_files_stay_without_overwrite(tmp_path: Path, name: str) -> None:
    save_frames(tmp_path / name, clip(), 24)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="exists already"):
        save_frames(tmp_path / name, clip(), 24)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_overwriting_a_sequence_removes_its_longer_tail(tmp_path: Path) -> None:
    (tmp_path / "other.png").touch()
    save_frames(tmp_path / "a_%02d.png", clip(5), 24)
    save_frames(tmp_path / "a_%02d.png", clip(3), 24, overwrite=True)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["a_00.png", "a_01.png", "a_02.png", "other.png"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_lost_nor_is_the_video(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    with caplog.at_level(logging.WARNING), open_writer(tmp_path / "a.mp4", 48, 32, 24) as writer:
        writer.write(clip())
        (tmp_path / "a.mp4").write_text("precious")
    assert (tmp_path / "a.mp4").read_text() == "precious"
    assert writer.path == tmp_path / "a-1.mp4"
    assert len(decode(writer.path)) == 5
    assert "appeared meanwhile" in caplog.text
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    for frames in (np.zeros((1, 32, 40, 3), np.uint8), np.zeros((1, 32, 48, 3), np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            save_frames_of(tmp_path, frames)
    with (
        pytest.raises(UsageError, match="one frame"),
        open_writer(tmp_path / "a.png", 48, 32, 24) as writer,
    ):
        writer.write(clip(2))
    assert list(tmp_path.iterdir()) == []


def save_frames_of(folder: Path, frames: np.ndarray) -> None:
    with open_writer(folder / "a.mp4", 48, 32, 24) as writer:
        writer.write(frames)


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = save_frames(tmp_path / "a.mp4", clip(), 24)
    assert path.stat().st_mode == plain.stat().st_mode


def test_sidecar(tmp_path: Path) -> None:
    path = write_sidecar(tmp_path / "a.mp4", {"request": {"prompt": "é"}})
    assert path == tmp_path / "a.json"
    assert read_metadata(path) == {"request": {"prompt": "é"}}
    write_sidecar(tmp_path / "a.mp4", {"request": {"prompt": "b"}}, overwrite=True)
    assert read_metadata(path) == {"request": {"prompt": "b"}}
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_of_a_killed_run_are_replaced_if_its_checkpoint_is_there(tmp_path: Path) -> None:
    path = tmp_path / "f_%02d.png"
    for number in (1, 2):
        frame_path(path, number).write_bytes(b"of a killed run")
    with pytest.raises(UsageError, match="unfinished sequence: its first frame is missing"):
        check_output(path)
    checkpoint_path(path).write_bytes(b"")
    save_frames(path, np.zeros((3, 8, 8, 3), np.uint8), 1)
    assert Image.open(frame_path(path, 1)).size == (8, 8)
    with pytest.raises(UsageError, match="exists already"):
        check_output(path)
