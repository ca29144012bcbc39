"""Predicted activations of the encoders against MLX's own peak, on networks small enough to try."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.memory.activations import ExecutionMode, spatial_encoder_work, temporal_encoder_work
from mlx_sora.memory.planner import Machine, MediaWorkload, Workload, make_plan
from mlx_sora.memory.requirements import stage_requirements
from mlx_sora.models import ops
from mlx_sora.models.vae import VideoVAE
from tests.unit.memory.test_activations import VAE, close, filled, mode, peak  # noqa: F401
from tests.unit.memory.test_planner import CPU, XL

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="the factors for GPUs are not measured")

FULL = replace(XL, encoders=(580 * 10**6, 137 * 10**6, 717 * 10**6))
PLAIN = Workload(plan_geometry(Size(426, 240), 51), text_tokens=60, evaluations=30)


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 96, 128), (3, 64, 64)])
def test_spatial_encoder(mode: ExecutionMode, frames: int, rows: int, columns: int) -> None:  # noqa: F811
    network = VideoVAE(VAE, ("encoder",)).spatial_vae
    filled(network)
    x = mx.zeros((frames, rows, columns, 3))
    mx.eval(x)
    measured = peak(lambda: network.encode(x))
    assert close(spatial_encoder_work(VAE, rows, columns, frames, mode), measured, 2)


@pytest.mark.parametrize(("frames", "rows", "columns"), [(17, 18, 20), (17, 8, 8), (5, 18, 32)])
def test_temporal_encoder(mode: ExecutionMode, frames: int, rows: int, columns: int) -> None:  # noqa: F811
    network = VideoVAE(VAE, ("encoder",)).temporal_vae
    filled(network)
    x = mx.zeros((1, frames, rows, columns, 4))
    mx.eval(x)
    measured = peak(lambda: network.encode(x))
    assert close(temporal_encoder_work(VAE, frames, rows, columns, mode), measured, 2.5)


def test_media_are_a_stage_of_the_plan() -> None:
    job = replace(PLAIN, media=MediaWorkload(chunks=2, longest=17, pixels=1920 * 1080))
    plan = make_plan(FULL, job, CPU, 3 * 10**9)
    assert [stage.stage for stage in plan.stages] == ["encode", "read", "denoise", "decode"]
    reading = plan.stage("read")
    assert reading.peak <= 3 * 10**9
    assert reading.in_turn
    once = make_plan(FULL, replace(job, media=MediaWorkload(1, 17, 10**6)), CPU).stage("read")
    assert reading.flops == 2 * once.flops
    assert make_plan(FULL, PLAIN, CPU).stages[1].stage == "denoise"


def test_clips_read_the_weights_again_and_decode_what_is_new() -> None:
    once = make_plan(XL, PLAIN, CPU)
    thrice = make_plan(XL, replace(PLAIN, clips=3, shared=17), CPU)
    for stage in ("denoise", "decode"):
        assert thrice.stage(stage).read == 3 * once.stage(stage).read
    assert thrice.stage("denoise").flops == 3 * once.stage("denoise").flops
    assert thrice.stage("decode").flops == pytest.approx(
        once.stage("decode").flops * (51 + 2 * 34) / 51
    )
    assert thrice.stage("encode") == once.stage("encode")
    # The file stays open while the next clip is denoised.
    assert thrice.stage("denoise").peak > once.stage("denoise").peak


def test_reading_has_a_need_of_its_own() -> None:
    job = replace(PLAIN, media=MediaWorkload(1, 17, 3840 * 2160))
    small = replace(PLAIN, media=MediaWorkload(1, 17, 64 * 64))
    machine = Machine(gpu=False, cache=4 << 30)
    large, little = (
        stage_requirements(FULL, j, machine, throttled=True)[1].least for j in (job, small)
    )
    assert large - little == 36 * (3840 * 2160 - 64 * 64)
