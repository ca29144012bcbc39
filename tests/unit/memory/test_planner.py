"""Plans of runs within and without a budget, and runs that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.memory.limits import MIN_CACHE
from mlx_sora.memory.plan import (
    PYAV,
    WRITERS,
    Machine,
    MediaWorkload,
    ModelSizes,
    Plan,
    StagePlan,
    StepVariant,
    VAESizes,
    WeightSizes,
    Workload,
    program_memory,
    writer_memory,
)
from mlx_sora.memory.planner import _smaller_workloads, make_plan, stage_limits
from mlx_sora.memory.profiles import PROFILES, parse_bytes
from mlx_sora.memory.requirements import stage_requirements
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig
from mlx_sora.request.techniques import PAPER_SITES
from mlx_sora.video.encoders import FILMS

MB, GB = 10**6, 10**9

#: Open-Sora 1.2 in float32: T5 v1.1 XXL, STDiT3-XL/2 and the decoders.
XL = ModelSizes(
    text=T5Config(),
    transformer=STDiT3Config(),
    vae=VAEConfig(),
    text_weights=WeightSizes((772 * MB,) * 24, 772 * MB, 0, 24 * 772 * MB, 0),
    transformer_weights=WeightSizes((170 * MB,) * 28, 170 * MB, 74 * MB, 28 * 170 * MB, 74 * MB),
    vae_decoder=VAESizes(temporal=661 * MB, spatial=198 * MB, stored=859 * MB),
)

CPU = Machine(gpu=False, cache_limit=4 << 30)


def workload(width: int = 426, height: int = 240, frames: int = 51, **options: object) -> Workload:
    plain = Workload(plan_geometry(Size(width, height), frames), text_tokens=60, evaluations=30)
    return replace(plain, **options)  # type: ignore[arg-type]


def denoising(budget: int | None = None, *, streamed: bool = False, **options: object) -> StagePlan:
    """Return the plan of denoising XL on a CPU."""
    return make_plan(XL, workload(**options), CPU, budget, streamed=streamed).stage("denoise")


def test_full_size_fits_a_phone() -> None:
    for size in ((256, 144), (426, 240)):
        plan = make_plan(XL, workload(*size), CPU, PROFILES["iphone-15-pro"])
        assert plan.peak <= 3.3 * GB
        assert plan.smallest < 1.5 * GB
        encode, denoise, decode = plan.stages
        assert (encode.resident, encode.prefetch) == (0, True)
        assert 0 < denoise.resident < denoise.blocks
        assert denoise.prefetch
        assert decode.sequential_offload


@pytest.mark.parametrize("budget", [1.3, 1.5, 2, 2.7, 3.3, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("gpu", [False, True])
def test_every_stage_stays_within_the_budget(budget: float, gpu: bool) -> None:
    machine = replace(CPU, gpu=gpu)
    most = int(budget * GB)
    small = workload(256, 144)
    if make_plan(XL, small, machine).smallest > most:
        with pytest.raises(MemoryBudgetError):
            make_plan(XL, small, machine, most)
        return
    plan = make_plan(XL, small, machine, most)
    for stage in plan.stages:
        assert program_memory(gpu=gpu) < stage.peak <= most
        assert stage.cache_limit >= (MIN_CACHE if gpu else 8 * MB)  # of T5, whose pieces are small
        cache = 0 if gpu else stage.cache_limit  # Metal's memory limit counts it
        assert 0 < stage.memory_limit < stage.peak - cache


def test_larger_budgets_keep_more_blocks_and_read_less() -> None:
    plans = [make_plan(XL, workload(), CPU, int(b * GB)) for b in (1.4, 2, 3.3, 4, 6, 8)]
    kept = [plan.stage("denoise").resident for plan in plans]
    read = [plan.stage("denoise").read for plan in plans]
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 28
    assert read == sorted(read, reverse=True)
    assert read[-1] == XL.transformer_weights.stored
    assert read[0] == 74 * MB + 30 * 28 * 170 * MB
    batches = [plan.stage("decode").micro_batch for plan in plans]
    assert batches == sorted(batches)  # type: ignore[type-var]
    assert (batches[0], batches[-1]) == (1, 4)


def test_smallest_budget_is_exact_and_named() -> None:
    smallest = make_plan(XL, workload(), CPU).smallest
    assert make_plan(XL, workload(), CPU, smallest).peak <= smallest
    with pytest.raises(MemoryBudgetError) as error:
        make_plan(XL, workload(), CPU, smallest - 1)
    named = error.value.fix.split("--memory-budget ")[1].split()[0]
    assert 0 <= parse_bytes(named) - smallest < 10 * MB
    assert "Stage" in error.value.message


def test_windows_read_the_weights_once_and_keep_what_each_of_them_needs() -> None:
    clips = workload(clips=3, shared_frames=17, cached_residuals=2.0)
    windows = replace(clips, window_texts=1, cached_residuals=6.0)
    plans = [make_plan(XL, each, CPU) for each in (clips, windows)]
    for name, reads in (("encode", 1), ("denoise", 3), ("decode", 3)):
        one_by_one, together = (plan.stage(name) for plan in plans)
        assert together.flops == one_by_one.flops
        assert one_by_one.read == reads * together.read
    more = plans[1].stage("denoise").peak - plans[0].stage("denoise").peak
    residual = 4 * 2 * 15 * 15 * 27 * 1152
    latents = 10 * 4 * 35 * 30 * 53 * 4
    assert more == 4 * residual + latents - writer_memory(".mp4", Size(424, 240), 119) - PYAV
    scenes = make_plan(XL, replace(windows, window_texts=3), CPU).stage("denoise").peak
    text = 2 * 2 * 28 * 4 * 2 * 60 * 1152
    assert scenes == plans[1].stage("denoise").peak + 2 * text
    streamed = [
        make_plan(XL, each, CPU, streamed=True).stage("denoise") for each in (clips, windows)
    ]
    assert streamed[0].read - streamed[1].read == 2 * XL.transformer_weights.rest


def test_half_precision_of_the_vae_is_named_after_what_is_exact_and_on_gpus_only() -> None:
    large, gpu = workload(1280, 720), replace(CPU, gpu=True)
    names = [flags for flags, _ in _smaller_workloads(large, gpu)]
    assert names[:4] == [
        "--sequential-guidance",
        "--vae-dtype bfloat16",
        "--sequential-guidance --vae-dtype bfloat16",
        "--vae-tiles 2",
    ]
    assert len(set(names)) == len(names)
    half = replace(large, vae_itemsize=2)
    for other, machine in ((large, CPU), (half, gpu)):
        assert not any("--vae-dtype" in flags for flags, _ in _smaller_workloads(other, machine))


@pytest.mark.parametrize("budget", [None, 8 * GB])
def test_half_precision_of_the_vae_takes_less_memory(budget: int | None) -> None:
    machine = replace(CPU, gpu=True)
    plans = [make_plan(XL, workload(vae_itemsize=n), machine, budget) for n in (4, 2)]
    whole, half = (plan.stage("decode") for plan in plans)
    assert half.peak < whole.peak
    assert plans[0].stage("denoise") == plans[1].stage("denoise")


def test_smallest_budget_does_not_prefetch() -> None:
    model = replace(XL, vae_decoder=VAESizes(1, 1, 859 * MB))
    plan = make_plan(model, workload(), CPU, make_plan(model, workload(), CPU).smallest)
    tight = max(plan.stages, key=lambda stage: stage.peak)
    assert tight.stage == "denoise"
    assert (tight.resident, tight.prefetch) == (0, False)


def test_budget_error_suggests_sequential_guidance_if_it_helps() -> None:
    large = workload(1280, 720)
    model = replace(XL, vae=VAEConfig(), vae_decoder=VAESizes(1, 1, 859 * MB))
    both = make_plan(XL, large, CPU).smallest
    sequential = make_plan(XL, replace(large, sequential_guidance=True), CPU).smallest
    assert sequential <= both
    with pytest.raises(MemoryBudgetError) as error:
        make_plan(model, workload(854, 480, 204), CPU, 2 * GB)
    assert "--sequential-guidance" in error.value.fix
    with pytest.raises(MemoryBudgetError) as error:
        make_plan(XL, replace(workload(), guided=False), CPU, 1 * GB)
    assert "--sequential-guidance" not in error.value.fix


def test_only_tight_budgets_throttle() -> None:
    throttled = [
        [stage.throttled for stage in make_plan(XL, workload(), CPU, int(budget * GB)).stages]
        for budget in (1.3, 1.5, 2, 3.3)
    ]
    assert throttled == [[True] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert not any(stage.throttled for stage in make_plan(XL, workload(), CPU).stages)


def test_sequential_guidance_halves_activations_and_doubles_reading() -> None:
    both = denoising(int(3.3 * GB))
    sequential = denoising(int(3.3 * GB), sequential_guidance=True)
    assert sequential.flops == both.flops
    assert sequential.resident > both.resident
    streamed = denoising(streamed=True, sequential_guidance=True)
    assert streamed.read == 74 * MB + 60 * 28 * 170 * MB
    # Text keys and values of the pass without prompt: 28 pairs of blocks, 60 tokens, in float32.
    assert sequential.reserve == 28 * 2 * 2 * 60 * 1152 * 4
    assert both.reserve == 0


def test_without_a_budget_all_blocks_are_resident_or_none() -> None:
    free = make_plan(XL, workload(), CPU)
    assert [stage.resident for stage in free.stages] == [24, 28, 0]
    assert not free.stage("decode").sequential_offload
    assert free.stage("encode").peak > 18 * GB
    streamed = make_plan(XL, workload(), CPU, streamed=True)
    assert [stage.resident for stage in streamed.stages] == [0, 0, 0]
    assert streamed.peak < free.peak
    assert free.stage("denoise").flops == streamed.stage("denoise").flops


def test_streamed_blocks_do_not_stay_within_a_budget_either() -> None:
    plan = denoising(16 * GB, streamed=True)
    assert denoising(16 * GB).resident == 28
    assert (plan.resident, plan.prefetch) == (0, True)
    assert plan.read > 10 * denoising(16 * GB).read
    assert plan.peak < denoising(16 * GB).peak


def test_merged_steps_cost_less() -> None:
    plain = denoising().flops
    some = denoising(variants=((StepVariant((PAPER_SITES,) * 99), 15),)).flops
    every = denoising(variants=((StepVariant((PAPER_SITES,) * 99), 30),)).flops
    assert plain - some == pytest.approx(some - every)
    assert 1.2 < plain / every < 1.45


def test_step_variants_read_and_compute_less() -> None:
    def stage(*variants: tuple[StepVariant, int], **more: object) -> StagePlan:
        return denoising(streamed=True, variants=variants, **more)

    skipped, cond_only = StepVariant(blocks_skipped=True), StepVariant(cond_only=True)
    exact, half = stage(), stage((skipped, 15))
    blocks = XL.transformer_weights.stored_blocks
    assert exact.read - half.read == pytest.approx(15 * blocks, rel=0.01)
    assert 1.98 < exact.flops / half.flops < 2.0
    unguided = stage((cond_only, 20))
    assert unguided.read == exact.read
    assert unguided.flops == pytest.approx(exact.flops * 40 / 60, rel=0.01)
    sequential = stage((cond_only, 20), sequential_guidance=True)
    assert stage(sequential_guidance=True).read - sequential.read == pytest.approx(
        20 * blocks, rel=0.01
    )


def test_cached_residuals_are_counted() -> None:
    plain = denoising()
    cached = denoising(cached_residuals=1.5)
    tensor = 4 * 2 * 15 * (15 * 27) * 1152
    assert cached.peak - plain.peak == int(1.5 * tensor)
    assert cached.reserve - plain.reserve == int(1.5 * tensor)
    assert (
        make_plan(XL, workload(cached_residuals=1.5), CPU).smallest
        >= make_plan(XL, workload(), CPU).smallest
    )


def test_casting_while_loading_takes_more() -> None:
    half = replace(XL, text_weights=replace(XL.text_weights, load_peak_bytes=(772 + 84) * MB))
    assert make_plan(half, workload(), CPU).smallest >= make_plan(XL, workload(), CPU).smallest


def test_decoding_peak_does_not_depend_on_the_length() -> None:
    image = make_plan(XL, workload(frames=1), CPU)
    clip = make_plan(XL, workload(frames=408), CPU)
    assert image.stage("denoise").flops < clip.stage("denoise").flops / 50
    # The peak of decoding does not depend on the clip's length.
    assert clip.stage("decode").peak == make_plan(XL, workload(), CPU).stage("decode").peak


def test_plan_to_dict_is_json_with_the_published_keys() -> None:
    plan = make_plan(XL, workload(), CPU, 4 * GB)
    assert isinstance(plan, Plan)
    values = json.loads(json.dumps(plan.to_dict()))
    assert [*values] == ["stages", "budget", "smallest", "peak"]
    assert values["peak"] == plan.peak
    denoise, decode = values["stages"][1:]
    assert denoise["resident"] == plan.stage("denoise").resident
    assert decode["in_turn"] is plan.stage("decode").sequential_offload is True
    assert [*decode] == [
        *("stage", "peak", "read", "flops", "cache_limit", "memory_limit", "throttled"),
        *("blocks", "resident", "prefetch", "reserve", "micro_batch", "in_turn"),
    ]


def test_stage_limits_are_restored() -> None:
    stage = make_plan(XL, workload(), CPU, 4 * GB).stage("denoise")
    before = mx.set_memory_limit(12 * GB)
    with pytest.raises(KeyError, match=str(stage.memory_limit)), stage_limits(stage):
        raise KeyError(mx.get_memory_limit())
    assert mx.set_memory_limit(before) == 12 * GB


def test_inversion_adds_unguided_evaluations() -> None:
    plain, both = (denoising(inversion=i) for i in (False, True))
    unguided = denoising(guided=False)
    assert both.flops == plain.flops + unguided.flops
    assert workload(inversion=True).block_passes == 60
    assert workload(inversion=True, sequential_guidance=True).block_passes == 90


def test_captured_values_are_counted() -> None:
    budget, captured = 4 * GB, GB
    plain, capturing = (denoising(budget, inversion=True, captured_bytes=n) for n in (0, captured))
    assert capturing.peak <= budget
    assert capturing.resident < plain.resident
    assert capturing.reserve == plain.reserve + captured
    with pytest.raises(MemoryBudgetError):
        make_plan(XL, workload(inversion=True, captured_bytes=budget), CPU, budget)


WITH_ENCODERS = replace(XL, vae_encoder=VAESizes(580 * MB, 137 * MB, 717 * MB))


def test_media_add_a_stage() -> None:
    media = MediaWorkload(chunks=2, chunk_frames=17, source_pixels=1920 * 1080)
    plan = make_plan(WITH_ENCODERS, workload(media=media), CPU, 3 * GB)
    assert [stage.stage for stage in plan.stages] == ["encode", "read", "denoise", "decode"]
    stage = plan.stage("read")
    assert stage.peak <= 3 * GB
    assert stage.sequential_offload
    once = make_plan(WITH_ENCODERS, workload(media=MediaWorkload(1, 17, 10**6)), CPU).stage("read")
    assert stage.flops == 2 * once.flops
    assert make_plan(WITH_ENCODERS, workload(), CPU).stages[1].stage == "denoise"


def test_larger_source_frames_need_more_memory() -> None:
    large, small = (
        stage_requirements(
            WITH_ENCODERS, workload(media=MediaWorkload(1, 17, pixels)), CPU, throttled=True
        )[1].minimum
        for pixels in (3840 * 2160, 64 * 64)
    )
    assert large - small == 60 * (3840 * 2160 - 64 * 64)


def test_each_clip_reads_the_weights_again_and_decodes_its_new_frames() -> None:
    once = make_plan(XL, workload(), CPU)
    thrice = make_plan(XL, workload(clips=3, shared_frames=17), CPU)
    for stage in ("denoise", "decode"):
        assert thrice.stage(stage).read == 3 * once.stage(stage).read
    assert thrice.stage("denoise").flops == 3 * once.stage("denoise").flops
    assert thrice.stage("decode").flops == pytest.approx(
        once.stage("decode").flops * (51 + 2 * 34) / 51
    )
    assert thrice.stage("encode") == once.stage("encode")
    # The file stays open while the next clip is denoised.
    assert thrice.stage("denoise").peak > once.stage("denoise").peak


def test_the_format_of_the_file_counts() -> None:
    def decoding(suffix: str, frames: int = 51) -> int:
        return make_plan(XL, workload(frames=frames, suffix=suffix), CPU).stage("decode").peak

    size = workload().geometry.decoded
    for suffix in WRITERS:
        added = writer_memory(suffix, size, 51) + PYAV * (suffix in FILMS)
        assert decoding(suffix) - decoding(".png") == added - writer_memory(".png", size, 51)
        enlarged = replace(workload(suffix=suffix), scale=3).writer_bytes
        assert enlarged == writer_memory(suffix, size.enlarged(3), 51)
    # Pillow takes all frames of a WebP at once; those of mp4 are compressed as they come.
    assert decoding(".webp", 408) - decoding(".webp") == 8 * (408 - 51) * size.width * size.height
    assert decoding(".mp4", 408) == decoding(".mp4")


def test_pictures_need_no_decoder_of_videos() -> None:
    pictures, videos = (
        make_plan(WITH_ENCODERS, workload(media=MediaWorkload(1, 17, 10**6, each)), CPU)
        for each in (False, True)
    )
    assert all(a.peak < b.peak for a, b in zip(pictures.stages, videos.stages, strict=True))
