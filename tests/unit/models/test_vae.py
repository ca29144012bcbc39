"""The video VAE: chunks, micro batches, streaming and partial construction change nothing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sora import geometry
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models import ops, vae_spatial, vae_temporal
from mlx_sora.models.vae import (
    KEYS,
    LATENT_FACTOR,
    Chunk,
    EncodeNoise,
    Posterior,
    VAEConfig,
    VideoVAE,
    chunk_plan,
    key_map,
)
from mlx_sora.models.vae_spatial import SpatialVAE, SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAE, TemporalVAEConfig
from tests.helpers.tolerance import on_real_gpu, rounding

#: Two orders of the same float32 work, in standard deviations of the result.
SAME = rounding(1e-5)

SMALL: dict[str, Any] = {
    "spatial_config": {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1}
    | {"norm_num_groups": 4, "act_fn": "silu", "scaling_factor": 0.13025},
    "temporal_config": {"filters": 8, "num_res_blocks": 1, "channel_multipliers": [1, 1, 2, 2]}
    | {"num_groups": 4},
    "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
    "model_type": "VideoAutoencoderPipeline",
}


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def randomize(module: nn.Module) -> None:
    """Random parameters of the size that keeps activations near one."""
    leaves = []
    for i, (path, value) in enumerate(tree_flatten(module.parameters())):
        noise = normal(100 + i, *value.shape)
        if value.ndim > 1:
            fan_in = value.size // value.shape[-2]
            leaves.append((path, noise * fan_in**-0.5))
        else:
            leaves.append((path, 0.1 * noise + (1.0 if path.endswith("weight") else 0.0)))
    module.update(tree_unflatten(leaves))


def small_vae(**changes: Any) -> VideoVAE:
    vae = VideoVAE(VAEConfig.from_dict(SMALL | changes))
    for part in (vae.spatial_vae, vae.temporal_vae):
        randomize(part)
    return vae


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return small_vae()


def difference(a: mx.array, b: mx.array) -> float:
    left, right = np.array(a, np.float64), np.array(b, np.float64)
    assert left.shape == right.shape
    return float(np.abs(left - right).max() / right.std())


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (8, 2), (9, 3), (17, 5), (18, 6), (42, 12), (51, 15), (204, 60)]
)
def test_chunks_cover_the_clip_once(frames: int, latents: int) -> None:
    plan = chunk_plan(frames, 17)
    assert [c.frame for c in plan] == list(range(0, frames, 17))
    assert sum(c.frames for c in plan) == frames
    assert max(c.frames for c in plan) <= 17
    assert [c.latent for c in plan] == [5 * i for i in range(len(plan))]
    assert sum(c.latents for c in plan) == latents == geometry.latent_frames(frames)


def test_no_micro_frame_size_means_one_chunk() -> None:
    assert chunk_plan(51, None) == [Chunk(0, 51, 0, 13)]
    assert geometry.latent_frames(51, None) == 13


def test_a_clip_has_frames() -> None:
    with pytest.raises(UsageError, match="got 0"):
        chunk_plan(0, 17)


def test_the_published_config_is_sdxl_and_vae_temporal_sd() -> None:
    config = VAEConfig.from_dict(
        {
            "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": "x", "micro_batch_size": 2},
            "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
            "micro_frame_size": 17,
            "shift": [-0.1, 0.34, 0.27, 0.98],
            "scale": [3.85, 2.32, 2.33, 3.06],
            "model_type": "VideoAutoencoderPipeline",
            "cal_loss": False,
        }
    )
    assert config == VAEConfig(micro_batch_size=2)
    assert (config.spatial.factor, config.temporal.factor) == (8, 4)


def test_constants_of_all_channels_may_be_one_number() -> None:
    config = VAEConfig.from_dict({"shift": 0, "scale": 2.5, "micro_frame_size": None})
    assert (config.shift, config.scale) == ((0.0,) * 4, (2.5,) * 4)
    assert config.micro_frame_size is None


@pytest.mark.parametrize(
    ("config", "values", "named"),
    [
        (SpatialVAEConfig, {"act_fn": "relu"}, "relu"),
        (TemporalVAEConfig, {"temporal_downsample": [True]}, "temporal_downsample"),
    ],
)
def test_configurations_that_cannot_be_built(config: Any, values: Any, named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        config.from_dict(values)


def test_micro_batches_change_nothing(vae: VideoVAE) -> None:
    z = normal(1, 1, 6, 3, 4, 4)
    alone = vae.decode(z, 18, micro_batch=1)
    for size in (4, 17):
        assert difference(vae.decode(z, 18, micro_batch=size), alone) <= SAME


def test_streaming_is_the_whole_clip_cut_into_chunks(vae: VideoVAE) -> None:
    z = normal(1, 1, 12, 2, 3, 4)
    chunks = list(vae.decode_chunks(z, 42))
    assert [c.shape for c in chunks] == [(17, 16, 24, 3), (17, 16, 24, 3), (8, 16, 24, 3)]
    assert {c.dtype for c in chunks} == {mx.float32}
    assert mx.array_equal(mx.concatenate(chunks), vae.decode(z, 42)[0])
    # Chunks do not see each other: the middle one alone decodes to the same frames.
    assert difference(next(vae.decode_chunks(z[:, 5:10], 17)), chunks[1]) <= SAME


def test_decoding_follows_the_definition(vae: VideoVAE) -> None:
    """Unscale, temporal decoder, latent factor, spatial decoder: all frames at once."""
    z = normal(1, 1, 3, 2, 3, 4)
    latents = z * mx.array([3.85, 2.32, 2.33, 3.06]) + mx.array([-0.1, 0.34, 0.27, 0.98])
    frames = vae.temporal_vae.decode(latents, 9)
    expected = vae.spatial_vae.decode(frames[0] / 0.18215)
    assert difference(vae.decode(z, 9)[0], expected) <= SAME
    assert LATENT_FACTOR == 0.18215


def test_attention_of_gpus_in_pieces_changes_nothing(
    vae: VideoVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of one query at a time agree with those of the CPU's form."""
    z = normal(1, 1, 2, 4, 6, 4)
    whole = vae.decode(z, 5)
    mx.eval(whole)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    for name in ("MAX_FUSED_HEAD", "LOGITS_BYTES", "MIN_QUERIES"):
        monkeypatch.setattr(ops, name, 1)
    assert difference(vae.decode(z, 5), whole) <= SAME


def test_a_batch_is_its_samples(vae: VideoVAE) -> None:
    z, x = normal(1, 2, 2, 2, 2, 4), normal(2, 2, 8, 16, 16, 3)
    frames, latents = vae.decode(z, 8), vae.encode(x)
    assert frames.shape == (2, 8, 16, 16, 3)
    assert latents.shape == (2, 2, 2, 2, 4)
    for b in range(2):
        assert difference(frames[b : b + 1], vae.decode(z[b : b + 1], 8)) <= SAME
        assert difference(latents[b : b + 1], vae.encode(x[b : b + 1])) <= SAME


@pytest.mark.parametrize(("samples", "latents"), [(1, 4), (1, 6), (2, 5)])
def test_latents_of_another_length_are_refused_before_any_work(
    vae: VideoVAE, samples: int, latents: int
) -> None:
    with pytest.raises(UsageError, match=f"5 latents, not {samples} x {latents}"):
        vae.decode_chunks(mx.zeros((samples, latents, 2, 2, 4)), 17)


def streaming_peak(vae: VideoVAE, chunks: int) -> int:
    """MLX's peak over decoding so many chunks, beyond the latents; nothing may pile up."""
    z, left = normal(1, 1, 5 * chunks, 8, 8, 4), set()
    mx.eval(z)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for frames in vae.decode_chunks(z, 17 * chunks, micro_batch=1):
        assert frames.shape[0] == 17
        del frames
        left.add(mx.get_active_memory() - before)
    # A chunk's latents may lie in the buffer of all 20 frames, of which 3 are dropped: MLX decides
    # by what its scheduler still holds.
    assert max(left) - min(left) in (0, 3 * z[0, 0].nbytes)
    return int(mx.get_peak_memory()) - before


@pytest.mark.skipif(on_real_gpu(), reason="MLX runs ahead by commands")
def test_the_peak_of_streaming_does_not_grow_with_the_clip(vae: VideoVAE) -> None:
    # Compiled operations leave a few constants the first time.
    list(vae.decode_chunks(normal(1, 1, 5, 8, 8, 4), 17, micro_batch=1))
    # How far MLX's scheduler runs ahead depends on the machine's load: throttled, and the least of
    # a few counts.
    limit = mx.set_memory_limit(0)
    try:
        short, long = (min(streaming_peak(vae, chunks) for _ in range(4)) for chunks in (2, 5))
    finally:
        mx.set_memory_limit(limit)
    assert long <= 1.05 * short


def test_smaller_micro_batches_need_less_memory(vae: VideoVAE) -> None:
    z = normal(1, 1, 5, 8, 8, 4)
    peaks = []
    for size in (1, 17):
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(vae.decode(z, 17, micro_batch=size))
        peaks.append(mx.get_peak_memory())
    assert peaks[0] < 0.6 * peaks[1]


def test_encoding_without_noise_takes_the_means(vae: VideoVAE) -> None:
    x = normal(1, 1, 9, 16, 16, 3)
    zero = EncodeNoise(mx.zeros((9, 2, 2, 4)), mx.zeros((1, 3, 2, 2, 4)))
    assert mx.array_equal(vae.encode(x), vae.encode(x, zero))
    for size in (1, 9):
        assert difference(vae.encode(x, micro_batch=size), vae.encode(x)) <= SAME


def test_frames_beyond_the_last_whole_latent_are_dropped(vae: VideoVAE) -> None:
    assert vae.encode(normal(1, 1, 1, 31, 26, 3)).shape == (1, 1, 3, 3, 4)


def test_log_variance_is_clamped() -> None:
    posterior = Posterior.from_moments(mx.array([[1.0, 2.0, -99.0, 99.0]]))
    assert posterior.logvar.tolist() == [[-30.0, 20.0]]
    assert posterior.sample(None).tolist() == [[1.0, 2.0]]


def test_whole_clip_at_once_without_micro_frames(vae: VideoVAE) -> None:
    whole = small_vae(micro_frame_size=None)
    z = normal(1, 1, 6, 2, 2, 4)
    assert whole.latent_frames(21) == 6
    frames = whole.decode(z, 21)
    assert frames.shape == (1, 21, 16, 16, 3)
    # Longer than 17 frames, later frames see earlier ones: the chunked result is another.
    assert difference(frames[:, :18], vae.decode(z, 18)) > 1e-2
    assert whole.encode(frames).shape == z.shape


def stored(vae: VideoVAE, attention: dict[str, str] | None = None) -> dict[str, mx.array]:
    """The VAE as a checkpoint in the reference's layout, with other names for its attention."""
    out: dict[str, mx.array] = {}
    for path, value in tree_flatten(vae.parameters()):
        if path in ("shift", "scale"):
            out[path] = value.reshape(1, -1, 1, 1, 1)
            continue
        name = path.replace("spatial_vae.", "spatial_vae.module.")
        if value.ndim == 4:
            value = value.transpose(2, 3, 0, 1)
        elif value.ndim == 5:
            value = value.transpose(3, 4, 0, 1, 2)
        temporal = name.startswith("temporal_vae.")
        if temporal and "norm" not in name:
            head, _, leaf = name.rpartition(".")
            name = f"{head}.conv.{leaf}"
        if value.ndim == 2 and (temporal or "attentions" not in name):
            value = value.reshape(*value.shape, *[1] * (3 if temporal else 2))
        for new, old in (attention or {}).items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                value = value.reshape(*value.shape, 1, 1) if value.ndim == 2 else value
        out[name] = value
    return out


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("attention", [None, OLD], ids=["current", "older"])
def test_both_spellings_of_attention_load(vae: VideoVAE, attention: dict[str, str] | None) -> None:
    checkpoint = stored(vae, attention)
    assert any(".query." in key for key in checkpoint) == bool(attention)
    loaded = VideoVAE(VAEConfig.from_dict(SMALL))
    load_weights(loaded, checkpoint, KEYS)
    z = normal(1, 1, 2, 2, 2, 4)
    assert difference(loaded.decode(z, 8), vae.decode(z, 8)) <= SAME


def test_shift_and_scale_of_the_checkpoint_win(vae: VideoVAE) -> None:
    checkpoint = stored(vae)
    z = normal(1, 1, 1, 2, 2, 4)
    loaded = VideoVAE(VAEConfig.from_dict(SMALL))
    load_weights(loaded, checkpoint | {"shift": mx.ones((1, 4, 1, 1, 1))}, KEYS)
    assert difference(loaded.decode(z, 1), vae.decode(z, 1)) > 1e-2
    without = {k: v for k, v in checkpoint.items() if k not in ("shift", "scale")}
    load_weights(loaded := VideoVAE(VAEConfig.from_dict(SMALL)), without, KEYS)
    assert difference(loaded.decode(z, 1), vae.decode(z, 1)) <= SAME


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_half_loads_from_the_whole_checkpoint(vae: VideoVAE, part: str) -> None:
    half = VideoVAE(VAEConfig.from_dict(SMALL), (part,))
    load_weights(half, stored(vae), key_map((part,)))
    paths = {path for path, _ in tree_flatten(half.parameters())}
    other = ({"encoder", "decoder"} - {part}).pop()
    assert not any(f".{other}." in path for path in paths)
    if part == "decoder":
        z = normal(1, 1, 2, 2, 2, 4)
        assert difference(half.decode(z, 8), vae.decode(z, 8)) <= SAME
    else:
        x = normal(1, 1, 8, 16, 16, 3)
        assert difference(half.encode(x), vae.encode(x)) <= SAME


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights_still_compute_in_float32(vae: VideoVAE, dtype: mx.Dtype) -> None:
    halved = {name: value.astype(dtype) for name, value in stored(vae).items()}
    half, full = (VideoVAE(VAEConfig.from_dict(SMALL)) for _ in range(2))
    load_weights(half, halved, KEYS)
    load_weights(full, halved, KEYS, dtype=mx.float32)
    z, x = normal(1, 1, 2, 4, 4, 4), normal(2, 1, 8, 32, 32, 3)
    assert half.decode(z.astype(dtype), 8).dtype == mx.float32
    assert difference(half.decode(z, 8), full.decode(z, 8)) <= SAME
    assert difference(half.encode(x), full.encode(x)) <= SAME


def test_a_missing_tensor_is_named(vae: VideoVAE) -> None:
    checkpoint = stored(vae)
    del checkpoint["temporal_vae.decoder.conv_out.conv.weight"]
    with pytest.raises(WeightsError, match="temporal_vae.decoder.conv_out"):
        load_weights(VideoVAE(VAEConfig.from_dict(SMALL)), checkpoint, KEYS)


def test_temporal_vae_is_causal() -> None:
    vae = TemporalVAE(TemporalVAEConfig.from_dict(SMALL["temporal_config"]))
    randomize(vae)
    assert vae_temporal.KEYS.optional == vae_spatial.KEYS.optional == frozenset()
    assert [vae.config.latent_frames(n) for n in (1, 4, 5, 8, 17)] == [1, 1, 2, 2, 5]
    assert vae.encode(normal(1, 2, 5, 3, 3, 4)).shape == (2, 2, 3, 3, 8)
    assert vae.decode(normal(1, 2, 2, 3, 3, 4), 5).shape == (2, 5, 3, 3, 4)


def test_spatial_attention_sees_the_whole_image() -> None:
    vae = SpatialVAE(SpatialVAEConfig.from_dict(SMALL["spatial_config"]))
    randomize(vae)
    z = normal(1, 1, 8, 8, 4)
    corner = mx.zeros_like(z)
    corner[0, 7, 7] = 1.0
    assert mx.abs(vae.decode(z + corner) - vae.decode(z))[0, 0, 0].max().item() > 0


@pytest.mark.parametrize("sequential_offload", [False, True])
def test_chunks_are_encoded_as_the_clip_is(sequential_offload: bool) -> None:
    vae = small_vae()
    clip = normal(3, 1, 42, 16, 24, 3)
    whole = vae.encode(clip)
    pieces = [clip[0, chunk.frame : chunk.frame + chunk.frames] for chunk in vae.chunks(42)]
    parts = list(vae.encode_chunks(iter(pieces), 3, sequential_offload=sequential_offload))
    assert [part.shape[1] for part in parts] == [5, 5, 2]
    assert difference(mx.concatenate(parts, axis=1), whole) <= SAME
    assert ("spatial_vae" in vae) != sequential_offload
