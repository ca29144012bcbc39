"""Reconstructions: the same numbers as the VAE's own calls, in parts, within a budget."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import Pipeline
from mlx_sora.cli.main import main
from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.loading.networks import load_vae
from mlx_sora.pipeline import reconstruct
from mlx_sora.pipeline.reconstruct import prepare_reconstruction, reconstruction_request
from mlx_sora.runtime.events import Event
from mlx_sora.runtime.progress import RunProgress
from mlx_sora.video.frames import to_uint8
from mlx_sora.video.metadata import read_metadata, replay_options
from mlx_sora.video.reader import read_video
from mlx_sora.video.similarity import Similarity, ssim
from mlx_sora.video.writer import save_frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames, so two whole chunks and a part of one, of 36 x 32 pixels."""
    frames = np.full((40, 32, 36, 3), 8, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:22, 4 + i // 3 : 16 + i // 3] = (220, 40, 40)
    return save_frames(tmp_path_factory.mktemp("clip") / "a.mp4", frames, 12, None, False)


def expected(pipe: Pipeline, pixels: np.ndarray) -> np.ndarray:
    """Frames as the encoder and the decoder make them when they are called by hand."""
    vae = load_vae(pipe.model, ("encoder", "decoder"))
    chunks = [mx.array(pixels[i : i + 17]).astype(mx.float32) / 127.5 - 1 for i in (0, 17, 34)]
    latents = mx.concatenate(list(vae.encode_chunks(chunks)), axis=1)
    return np.concatenate([to_uint8(part) for part in vae.decode_chunks(latents, len(pixels))])


def test_it_is_the_vae_chunk_by_chunk(
    pipe: Pipeline, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_sora.geometry import Size

    source = read_video(clip, size=Size(32, 32)).frames
    found = pipe.reconstruct(clip)
    assert found.frames is not None
    assert np.array_equal(found.frames, expected(pipe, source))
    assert (found.width, found.height, found.num_frames, found.fps) == (32, 32, 40, 12.0)
    assert list(found.warnings) == [f"{clip}: 36x32, cropped to 32x32."]

    by_hand = Similarity()
    by_hand.add(found.frames, source)
    record = found.metadata["reconstruction"]
    assert record == {
        "video": "a.mp4",
        "psnr": round(by_hand.psnr or 0, 3),
        "ssim": round(by_hand.ssim, 5),
    }
    assert record["psnr"] > 20

    again = pipe.reconstruct(source[:17])  # pixels in the place of a file
    assert np.array_equal(again.frames, found.frames[:17])

    monkeypatch.setattr(reconstruct, "PART_CHUNKS", 1)
    shares, progress = list[float](), RunProgress()

    def watch(event: Event) -> None:
        progress.handle(event)
        shares.append(progress.fraction)

    budget = pipe.reconstruct(clip, memory_budget="300MB", callback=watch)
    assert shares == sorted(shares)  # of all parts
    assert shares[-1] == pytest.approx(1)
    assert np.array_equal(budget.frames, found.frames)
    assert budget.metadata["reconstruction"] == record


def test_memory_does_not_grow_with_the_length(pipe: Pipeline, tmp_path: Path) -> None:
    """Of the plan, which refuses what does not fit; each part reads the weights again."""

    def plan(frames: int) -> tuple[int, int, int, int]:
        pixels = np.zeros((frames, 32, 32, 3), np.uint8)
        path = save_frames(tmp_path / f"{frames}.mp4", pixels, 24, None, False)
        request = reconstruction_request({"output": str(tmp_path / "out.mp4")})
        run = prepare_reconstruction(pipe.engine, path, request)
        assert sum(run.parts) == frames
        assert [stage.stage for stage in run.plan.stages] == ["read", "decode"]
        read = [stage.read for stage in run.plan.stages]
        return len(list(run.parts)), run.plan.peak, read[0], read[1]

    short, long = plan(544), plan(1200)
    assert (short[0], long[0]) == (1, 3)
    assert long[1] <= short[1]
    assert long[2:] == (3 * short[2], 3 * short[3])


def test_the_command_prints_and_records(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["reconstruct", str(clip), "--model", "shapes", "--num-frames", "5"]
    assert main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in plan["stages"]] == ["read", "decode"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == "a-reconstructed.mp4\n"
    assert "PSNR " in captured.err
    assert "SSIM " in captured.err
    assert main([*command, "--json", "--overwrite", "--show"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "--show needs a terminal that shows colours\n"
    found = json.loads(captured.out)
    record = read_metadata(tmp_path / "a-reconstructed.mp4")
    assert found["psnr"] == record["reconstruction"]["psnr"]
    assert (found["num_frames"], found["width"]) == (5, 32)
    with pytest.raises(UsageError, match="reconstruct"):
        replay_options(record)
    save_frames(tmp_path / "b.png", np.zeros((1, 32, 32, 3), np.uint8), 1, None, False)
    assert main(["reconstruct", "b.png", "--model", "shapes", "--quiet"]) == 0
    assert (tmp_path / "b-reconstructed.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 41}, "has 40 frames, 41 were asked for. Give num_frames=40 or less"),
        ({"num_frames": 0}, "0 were asked for"),
        ({"num_frames": "long"}, "long were asked for"),
        ({"steps": 3}, "A reconstruction has no option 'steps'"),
        ({"width": 8, "height": 8}, "Width 8 is impossible"),
        ({"vae_tiles": 4}, "too few for vae_tiles=4"),
        ({"vae_tiles": 9}, "vae_tiles"),
        ({"output": "a.txt"}, "Unknown output format"),
        ({"memory_budget": "9MB"}, "Stage read needs"),
    ],
)
def test_a_refusal_is_one_line(
    pipe: Pipeline, clip: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises((UsageError, MemoryBudgetError)) as caught:
        pipe.reconstruct(clip, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_source_is_not_replaced(pipe: Pipeline, clip: Path) -> None:
    with pytest.raises(UsageError, match="is also an input"):
        pipe.reconstruct(clip, output=clip, overwrite=True)
    with pytest.raises(UsageError, match="No such file"):
        pipe.reconstruct(clip.with_name("none.mp4"))


def test_similarity_of_the_same_and_of_known_frames() -> None:
    same, other = Similarity(), Similarity()
    grey = np.full((2, 16, 16, 3), 100, np.uint8)
    same.add(grey, grey)
    assert (same.psnr, same.ssim) == (None, 1.0)
    assert str(same) == "PSNR without end: the same frames, SSIM 1.000"
    other.add(grey, grey + np.uint8(10))
    assert other.psnr == pytest.approx(20 * np.log10(255 / 10))


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    random = np.random.default_rng(0)
    frame = random.integers(0, 256, (40, 31, 3), dtype=np.uint8)
    for spread in (3, 60):
        noise = random.integers(-spread, spread + 1, frame.shape)
        other = np.clip(frame + noise, 0, 255).astype(np.uint8)
        wanted = metrics.structural_similarity(frame, other, channel_axis=-1)
        assert ssim(frame, other) == pytest.approx(wanted, abs=1e-9)
