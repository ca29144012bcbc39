"""Health checks: each finds its damage, names stage and step, and passes legal videos."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.errors import NumericsError
from mlx_sora.loading.model_folder import find_model
from mlx_sora.models.precision import Precision
from mlx_sora.runtime.events import Event, Finished, StepFinished
from mlx_sora.runtime.health import FrameHealth, Health
from mlx_sora.sampling.loop import StepResult, denoise
from tests.helpers.golden import Case, channels_last

PROMPT = "a white circle moving right on a white background"
HEALTH = Health(Precision(), 7.0)
BF16 = Precision(mx.bfloat16, mx.bfloat16, mx.bfloat16)
F16 = Precision(mx.bfloat16, mx.float16, mx.float16)

Arrays = dict[str, mx.array]


def noise(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0))


# Damaged weights and damaged steps.


def scaled(key: str, factor: float) -> Callable[[Arrays], None]:
    def change(weights: Arrays) -> None:
        if key in weights:
            weights[key] = weights[key] * factor

    return change


def filled(key: str, value: float, *others: str) -> Callable[[Arrays], None]:
    def change(weights: Arrays) -> None:
        for other in others:
            weights[other] = mx.zeros_like(weights[other])
        weights[key] = mx.full(weights[key].shape, value, weights[key].dtype)

    return change


def broken(tmp_path: Path, part: str, change: Callable[[Arrays], None]) -> Pipeline:
    """Return the bundled model after `change` to the weights of one part."""
    folder, source = tmp_path / "model", find_model("shapes").path
    folder.mkdir()
    for each in source.iterdir():
        (folder / each.name).symlink_to(each)
    (folder / part).unlink()
    shutil.copytree(source / part, folder / part)
    for file in (folder / part).glob("*.safetensors"):
        weights: Arrays = dict(mx.load(str(file)))  # type: ignore[arg-type]
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(str(file), weights)
    return Pipeline.from_pretrained(folder)


NAN = float("nan")
NORM = "encoder.final_layer_norm.weight"
OUT = "spatial_vae.module.decoder.conv_out"
FAULTS = {
    "text nan": ("text_encoder", scaled(NORM, NAN), "encode.*doctor"),
    "text zero": ("text_encoder", scaled(NORM, 0), "are zero .*encod"),
    "step nan": ("transformer", scaled("x_embedder.proj.bias", NAN), "NaN .*step 1 of 1.*denoise"),
    "explode": ("transformer", scaled("final_layer.linear.weight", 1e3), "explode.*step 1 of 1"),
    "frame nan": ("vae", scaled(f"{OUT}.bias", NAN), "frames 0 to 0 .*decode.*VAE"),
    "black": ("vae", filled(f"{OUT}.bias", -40), "black.*decode.*health_check=False"),
    "white": ("vae", filled(f"{OUT}.bias", 40), "white"),
    "flat": ("vae", filled(f"{OUT}.bias", 0.5, f"{OUT}.weight"), "one colour"),
    "static": (
        "vae",
        filled(
            "temporal_vae.decoder.conv_out.conv.bias",
            1.0,
            "temporal_vae.decoder.conv_out.conv.weight",
        ),
        "All 17 frames are bit-identical",
    ),
}

#: Faults that are also tried without checks, one per stage.
TRIED_WITHOUT_CHECKS = ("text zero", "step nan", "static")


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_weights_stop_the_run(tmp_path: Path, fault: str) -> None:
    part, change, says = FAULTS[fault]
    pipe = broken(tmp_path, part, change)
    request = {
        "prompt": PROMPT,
        "steps": 1,
        "num_frames": 17 if fault == "static" else 1,
        "seed": 1,
    }
    output = tmp_path / "a.webp"
    with pytest.raises(NumericsError, match=says) as error:
        pipe(**request, output=output)
    assert error.value.fix
    assert not list(tmp_path.glob("*.webp")) + list(tmp_path.glob(".*"))
    if fault in TRIED_WITHOUT_CHECKS:
        assert pipe(**request, output=output, health_check=False).path == output


def poisoned(
    change: Callable[[mx.array], mx.array], at: int
) -> Callable[..., Iterator[StepResult]]:
    """Return the denoising loop with `change` to the latents of one step."""

    def steps(*args: Any, **more: Any) -> Iterator[StepResult]:
        for done in denoise(*args, **more):
            yield replace(done, z=change(done.z)) if done.step.index == at else done

    return steps


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda z: mx.where(mx.arange(z.size).reshape(z.shape) == 7, NAN, z), "NaN or Inf"),
        (lambda z: z - float("inf"), "NaN or Inf"),
        (lambda z: z * 1e30, "explode"),
        (mx.zeros_like, "the same number"),
        (lambda z: mx.broadcast_to(z[:, 2:3], z.shape), "all frames are the same"),
    ],
    ids=["nan", "inf", "explode", "flat", "static"],
)
def test_a_damaged_step_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[mx.array], mx.array], says: str
) -> None:
    monkeypatch.setattr("mlx_sora.sampling.loop.denoise", poisoned(change, 1))
    pipe, seen = Pipeline.from_pretrained("shapes"), list[Event]()
    request = GenerationRequest(PROMPT, steps=4, num_frames=17, seed=1)
    with pytest.raises(NumericsError, match=f"{says}.*after step 2 of 4"):
        seen.extend(pipe.stream(request))  # keeps those before the error
    assert [event.step for event in seen if isinstance(event, StepFinished)] == [0]


@pytest.mark.parametrize(
    ("health", "says"),
    [
        (Health(Precision(), 50.0), "--guidance 50"),
        (Health(Precision(), 7.0), "doctor"),
        (Health(BF16, 7.0), "doctor"),
    ],
)
def test_exploding_latents_name_the_likely_cause(health: Health, says: str) -> None:
    with pytest.raises(NumericsError, match=says):
        health.check_latents(noise(1, 2, 4, 4, 4) * 1e3, 0, 3)


def test_nan_in_half_precision_suggests_float32() -> None:
    nan = mx.full((3, 4), NAN)
    with pytest.raises(NumericsError, match="--dtype float32"):
        Health(BF16, 7.0).check_text(nan)
    with pytest.raises(NumericsError) as error:
        HEALTH.check_text(nan)
    assert "--dtype" not in str(error.value)


@pytest.mark.parametrize(
    ("precision", "fix"),
    [
        (Precision(), "doctor"),
        (BF16, "--vae-dtype float32"),
        (F16, "--vae-dtype bfloat16: float16 ends at 65504"),
    ],
)
def test_overflow_of_the_vae_names_its_type(precision: Precision, fix: str) -> None:
    health, nan = Health(precision, 7.0), mx.full((1, 2, 2, 3), NAN)
    with pytest.raises(NumericsError, match=fix):
        health.check_media(nan)
    with pytest.raises(NumericsError, match=fix):
        health.frame_health().add(nan)


def test_overflow_of_the_transformer_names_float16() -> None:
    with pytest.raises(NumericsError, match="--dtype bfloat16: float16 ends at 65504"):
        Health(F16, 7.0).check_latents(mx.full((1, 2, 2, 2, 4), NAN), 0, 3)
    with pytest.raises(NumericsError, match="--dtype float32"):
        Health(F16, 7.0).check_text(mx.full((3, 4), NAN))  # T5 runs in bfloat16 then


def test_media_latents_are_checked() -> None:
    with pytest.raises(NumericsError, match="stage read"):
        HEALTH.check_media(mx.array([[1.0, NAN]]))


# No false alarms.


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "a white square on a white background", "num_frames": 1},
        {"prompt": "a black circle growing on a black background"},
        {"prompt": "a black screen", "steps": 1},
        {"prompt": PROMPT, "guidance": 20.0},
    ],
    ids=str,
)
def test_legal_videos_pass(options: dict[str, Any]) -> None:
    request = GenerationRequest(**{"steps": 6, "num_frames": 17, "seed": 1, **options})
    *_, last = Pipeline.from_pretrained("shapes").stream(request)
    assert isinstance(last, Finished)


@pytest.mark.golden("rflow_sample", "rflow_sample_mask", "lpl_model", "lpl_script", "lpl_synth")
def test_runs_of_the_reference_pass(case: Case) -> None:
    """Also those with random weights and synthetic velocities."""
    finals = [name for name in case.tensors if name.endswith("final_z")]
    for name in finals:
        HEALTH.check_latents(channels_last(case[name]), 0, 1)
    assert finals


@pytest.mark.golden("vae_pipeline_decode")
def test_frames_of_a_random_decoder_pass(case: Case) -> None:
    names = [name for name in case.tensors if is_frames(name)]
    for name in names:
        health, frames = FrameHealth(), channels_last(case[name])[0]
        for start in range(0, len(frames), 17):
            health.add(frames[start : start + 17])
        health.finish()
    assert names


def is_frames(name: str) -> bool:
    return name.startswith("out.f") and name.endswith(".x")


@pytest.mark.golden("t5")
def test_text_of_the_reference_passes(case: Case) -> None:
    texts = case["out.last_hidden_state"]
    for states in texts:
        HEALTH.check_text(states)
    assert len(texts)


def frames(*chunks: mx.array) -> None:
    health = FrameHealth()
    for chunk in chunks:
        health.add(chunk)
    health.finish()


def test_still_and_white_frames_pass() -> None:
    picture = noise(1, 8, 8, 3)
    frames(picture)  # one frame
    frames(mx.ones((2, 8, 8, 3)) + 0.01 * noise(2, 8, 8, 3))  # white, and a little around it
    still = mx.broadcast_to(picture, (3, 8, 8, 3))
    frames(still, still + 1e-7)  # still, to within rounding
    frames(-mx.ones((2, 8, 8, 3)) * 1.5, noise(2, 8, 8, 3))  # fades in from black


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([mx.broadcast_to(noise(1, 8, 8, 3), (3, 8, 8, 3))] * 2, "All 6 frames"),
        ([mx.zeros((2, 8, 8, 3))], "one colour"),
        ([-1 - mx.abs(noise(2, 8, 8, 3))] * 2, "black"),
    ],
)
def test_degenerate_frames_are_found_across_chunks(chunks: list[mx.array], says: str) -> None:
    with pytest.raises(NumericsError, match=says):
        frames(*chunks)


def test_frames_that_differ_in_a_later_chunk_pass() -> None:
    still = mx.broadcast_to(noise(1, 8, 8, 3), (3, 8, 8, 3))
    frames(still, still, still[:1] + 0.1)
    with pytest.raises(NumericsError, match="All 7 frames"):
        frames(still, still, still[:1])


@pytest.mark.parametrize(
    "check",
    [
        lambda health: health.check_text(mx.zeros((2, 3))),
        lambda health: health.check_media(mx.array([NAN])),
        lambda health: health.check_latents(mx.full((1, 2, 3, 3, 4), NAN), 0, 1),
        lambda health: health.frame_health().add(mx.full((1, 2, 2, 3), NAN)),
        lambda health: health.frame_health().finish(),
    ],
)
def test_disabled_checks_pass(check: Callable[[Health], None]) -> None:
    with pytest.raises(NumericsError):
        check(HEALTH)
    check(replace(HEALTH, enabled=False))
