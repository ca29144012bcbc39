"""Previews of a run: what is foreseen, through the map, beside the output; or through the VAE."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.cli.main import main
from mlx_sora.errors import MlxSoraError, WeightsError
from mlx_sora.loading.model_folder import find_model
from mlx_sora.loading.preview_map import load_preview_map
from mlx_sora.models.preview_map import PreviewMap, preview_features
from mlx_sora.models.vae import Chunk, VideoVAE, chunk_plan
from mlx_sora.pipeline import preview_fit
from mlx_sora.pipeline.preview import map_latents
from mlx_sora.pipeline.preview_fit import PreviewClip, fit_preview_map
from mlx_sora.runtime.events import Event, Finished, Noted, PreviewReady, Warned
from mlx_sora.video.preview import PREVIEW_FILE, write_preview

OPTIONS = {"prompt": "a red circle", "seed": 1, "steps": 4, "num_frames": 17, "preview_every": 2}
OPTIONS |= {"width": 32, "height": 32, "memory_budget": "off"}


@pytest.fixture(scope="module")
def without_map(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(find_model("shapes").path, folder)
    (folder / PREVIEW_FILE).unlink()
    return Pipeline.from_pretrained(folder)


def events(pipe: Pipeline, **more: object) -> list[Event]:
    return list(pipe.stream(GenerationRequest.from_dict({**OPTIONS, **more})))


def previews(seen: list[Event]) -> list[PreviewReady]:
    return [event for event in seen if isinstance(event, PreviewReady)]


def test_a_small_gif_lies_beside_the_output_while_the_run_lasts(
    pipe: Pipeline, tmp_path: Path
) -> None:
    output, seen, names = tmp_path / "a.webp", list[Event](), set[str]()
    path = tmp_path / "a.preview.gif"
    for event in pipe.stream(GenerationRequest.from_dict({**OPTIONS, "output": str(output)})):
        seen.append(event)
        if isinstance(event, PreviewReady):
            names = {file.name for file in tmp_path.iterdir() if file.suffix != ".lock"}
            with Image.open(path) as gif:
                assert gif.n_frames == 5
                assert gif.info["duration"] == pytest.approx(17 / 24 / 5 * 1000, abs=10)
                assert json.loads(gif.info["comment"]) == {"preview": f"step {event.step + 1} of 4"}
    assert names == {path.name}
    shown = previews(seen)
    assert [event.step for event in shown] == [1, 3]
    assert [event.path for event in shown] == [str(path)] * 2
    assert [event.frames.shape for event in shown] == [(5, 32, 32, 3)] * 2
    assert not np.array_equal(shown[0].frames, shown[1].frames)
    announced = [event.message for event in seen if isinstance(event, Noted)]
    assert any(str(path) in line and "every 2 steps" in line for line in announced)
    assert [file.name for file in tmp_path.iterdir()] == ["a.webp"]


def test_previews_that_stay_are_named_after_what_they_show(pipe: Pipeline, tmp_path: Path) -> None:
    more = {"num_frames": 34, "loop": 2, "keep_previews": True}
    seen = events(pipe, output=str(tmp_path / "f_%02d.png"), steps=2, **more)
    found = sorted(file.name for file in tmp_path.iterdir() if "preview" in file.name)
    assert found == [f"f.preview.clip-{clip}-step-2.gif" for clip in (1, 2)]
    assert [Path(event.path or "").name for event in previews(seen)] == found
    events(pipe, output=str(tmp_path / "a.png"), num_frames=1, keep_previews=True)
    with Image.open(tmp_path / "a.preview.step-4.png") as picture:
        assert picture.size == (32, 32)


def test_an_interrupted_run_leaves_no_preview(pipe: Pipeline, tmp_path: Path) -> None:
    stream = pipe.stream(GenerationRequest.from_dict({**OPTIONS, "output": f"{tmp_path}/a.webp"}))
    assert any(isinstance(event, PreviewReady) for event in stream)
    assert (tmp_path / "a.preview.gif").exists()
    stream.close()
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_the_name_stays(pipe: Pipeline, tmp_path: Path) -> None:
    other = tmp_path / "a.preview.gif"
    output = {"output": f"{tmp_path}/a.mp4", "overwrite": True}
    Image.new("RGB", (8, 8)).save(other)
    with pytest.raises(UsageError, match="would be replaced by previews"):
        events(pipe, **output)
    events(pipe, **output, keep_previews=True)  # whose files have other names
    other.unlink()
    write_preview(other, np.zeros((5, 8, 8, 3), np.uint8), 8, "step 1 of 2")  # of a killed run
    events(pipe, **output)
    assert [file.name for file in tmp_path.iterdir() if ".step-" not in file.name] == ["a.mp4"]


def test_previews_change_nothing(pipe: Pipeline) -> None:
    seen, plain = events(pipe)[-1], events(pipe, preview_every=None)[-1]
    assert isinstance(seen, Finished)
    assert isinstance(plain, Finished)
    assert np.array_equal(seen.video.frames, plain.video.frames)


def test_the_map_shows_about_what_the_vae_would(pipe: Pipeline, without_map: Pipeline) -> None:
    prompt = "a blue square on a white background"
    shown, exact = (
        previews(events(each, prompt=prompt, width=64, height=64, steps=10))[-1].frames / 255
        for each in (pipe, without_map)
    )
    middles = exact[[0, 3, 7, 11, 15]]
    error = np.square(shown - middles).mean()
    assert -10 * np.log10(error) > 18
    assert error < np.square(shown - (1 - middles)).mean() / 4


def test_without_a_map_the_vae_has_the_type_of_the_run(
    without_map: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_sora.runtime.device._is_linux_cpu", lambda device: False)
    types = set()
    real = VideoVAE.decode_chunks

    def decode(vae: VideoVAE, *args: Any, **more: Any) -> Iterator[mx.array]:
        types.add(vae.dtype)
        return real(vae, *args, **more)

    monkeypatch.setattr(VideoVAE, "decode_chunks", decode)
    assert len(previews(events(without_map, num_frames=1, steps=2, vae_dtype="float16"))) == 1
    assert types == {mx.float16}


def test_without_a_map_the_vae_shows_what_comes(without_map: Pipeline) -> None:
    seen = events(without_map)
    finished = seen[-1]
    assert isinstance(finished, Finished)
    # The last step goes to t = 0, so what it foresees is what comes out.
    assert np.array_equal(previews(seen)[-1].frames, finished.video.frames)


def test_without_a_map_a_budget_is_refused(pipe: Pipeline, without_map: Pipeline) -> None:
    asked = GenerationRequest.from_dict({**OPTIONS, "memory_budget": "2GB"})
    with pytest.raises(UsageError, match='preview_every, set memory_budget="off", or fit'):
        without_map.plan(asked)
    assert pipe.plan(asked).budget == 2_000_000_000
    # A measured budget, the default on GPUs, is no wish of the user.
    measured = GenerationRequest.from_dict({**OPTIONS, "memory_budget": "auto"})
    assert without_map.plan(measured).budget is not None


def test_a_preview_that_cannot_be_written_is_a_warning(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise MlxSoraError("no space")

    monkeypatch.setattr("mlx_sora.pipeline.preview.write_preview", full)
    seen = events(pipe, output=str(tmp_path / "a.webp"))
    assert sum("no space" in e.message for e in seen if isinstance(e, Warned)) == 2
    assert [event.path for event in previews(seen)] == [None, None]
    assert isinstance(seen[-1], Finished)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"weights": [1], "psnr": 3}', '{"weights": "x", "psnr": []}'),
        '{"psnr": 1, "vae": [], "layers": []}',
        '{"psnr": 1, "vae": [], "layers": [[{"shape": [1], "float16": "?"}, 1]]}',
        '{"psnr": 1, "vae": [], "layers": [[{"shape": [1, 1], "float16": "AAA="}, '
        '{"shape": [1], "float16": "AAA="}]]}',
    ],
)
def test_a_damaged_map_is_named(without_map: Pipeline, text: str) -> None:
    file = without_map.model.path / PREVIEW_FILE
    file.write_text(text)
    try:
        with pytest.raises(WeightsError, match=PREVIEW_FILE):
            load_preview_map(without_map.model, 4)
    finally:
        file.unlink()
    assert load_preview_map(without_map.model, 4) is None


def test_the_bundled_map_is_small_and_says_how_good_it_is() -> None:
    model = find_model("shapes")
    found = load_preview_map(model, 4)
    assert found is not None
    record = json.loads((model.path / PREVIEW_FILE).read_text())
    assert found.psnr == record["psnr"] >= 20
    assert (model.path / PREVIEW_FILE).stat().st_size < 60_000


def test_the_map_of_another_vae_is_refused_and_the_advice_works(
    without_map: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without_map.model
    file = model.path / PREVIEW_FILE
    record = json.loads((find_model("shapes").path / PREVIEW_FILE).read_text())
    numbers = mx.array(record["vae"]).astype(mx.bfloat16).astype(mx.float32)
    file.write_text(json.dumps(record | {"vae": numbers.tolist()}))  # as convert stores weights
    assert load_preview_map(model, 4) is not None
    numbers[3] = 2 * numbers[3]
    file.write_text(json.dumps(record | {"vae": numbers.tolist()}))
    with pytest.raises(WeightsError, match="another VAE") as error:
        without_map.plan(GenerationRequest.from_dict(OPTIONS))
    monkeypatch.setattr(preview_fit, "CLIPS", 2)
    monkeypatch.setattr(preview_fit, "MAX_SIDE", 32)
    monkeypatch.setattr(preview_fit, "STEPS", 3)
    words = shlex.split(error.value.fix.partition("make another: ")[2])
    assert words[:3] == ["python", "-m", "mlx_sora"]
    assert main(words[3:-1]) == 2
    assert "exists already. Give --overwrite" in capsys.readouterr().err
    assert main(words[3:]) == 0
    found = load_preview_map(model, 4)
    assert found is not None
    assert found.psnr > 0
    Image.new("RGB", (40, 40)).save(file.parent / "a.png")
    other = ["-o", str(file.parent / "other.json"), "--material", str(file.parent / "a.png")]
    assert main([*words[3:-1], *other, "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("other.json\n")
    file.unlink()


def test_a_fit_comes_near() -> None:
    """Of flat colours, which their mean latents tell."""
    rng = np.random.default_rng(0)
    clips = [
        PreviewClip(
            mx.array(np.broadcast_to([*colour, 1], (5, 4, 4, 4)).astype(np.float32)),
            np.broadcast_to(colour, (5, 32, 32, 3)),
            chunk_plan(17, 17),
        )
        for colour in rng.random((40, 3))
    ]
    found = fit_preview_map(clips[8:], clips[:8], (1.0,), steps=150)
    assert found.psnr > 25


def test_a_place_sees_those_around_it_and_the_whole_frame() -> None:
    z = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3, 1)
    seen = np.array(preview_features(mx.array(z), [Chunk(0, 5, 0, 2)]))
    assert seen.shape == (2, 2, 3, 14)
    assert seen[1, 0, 1, :9].tolist() == [6, 7, 8, 6, 7, 8, 9, 10, 11]
    assert seen[1, 0, 1, 9:] == pytest.approx([8.5, z[1].std(), 5.5, z.std(), 0])
    assert (seen[0, ..., -1] == 1).all()


def test_a_linear_map_of_an_earlier_version_works() -> None:
    weights = np.zeros((2, 10, 3), np.float32)
    weights[0, -1], weights[1, -1] = 1.0, (0.0, 0.5, 2.0)
    found = PreviewMap.from_dict({"psnr": 1, "weights": weights.tolist()}, 1)
    shown = map_latents(found, mx.zeros((5, 2, 3, 1)), 17)
    assert shown.shape == (5, 16, 24, 3)
    assert (shown[0] == 255).all()
    assert (shown[1] == (0, 128, 255)).all()


@pytest.mark.parametrize(("size", "scale"), [((90, 160), 1), ((45, 80), 2), ((8, 8), 8)])
def test_large_videos_have_small_previews(size: tuple[int, int], scale: int) -> None:
    found = load_preview_map(find_model("shapes"), 4)
    assert found is not None
    shown = map_latents(found, mx.zeros((1, *size, 4)), 1)
    assert shown.shape == (1, size[0] * scale, size[1] * scale, 3)
