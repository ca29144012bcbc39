"""Tiles: where they lie, how they are put together, how far off they are, and what they save."""

from __future__ import annotations

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sora.geometry import MAX_TILES
from mlx_sora.loading.model_folder import find_model
from mlx_sora.loading.networks import load_vae
from mlx_sora.models import ops
from mlx_sora.models import vae_tiling as vae_tiles
from mlx_sora.models.conv import GroupNorm, group_moments, upsample2x
from mlx_sora.models.vae import VAEConfig, VideoVAE
from mlx_sora.models.vae_spatial import SpatialVAE, SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAEConfig
from mlx_sora.models.vae_tiling import decode_tiled, tile_side, tile_spans, use_moments
from tests.helpers import networks
from tests.helpers.tolerance import on_real_gpu, rounding

TILES = range(2, MAX_TILES + 1)


@given(st.integers(1, MAX_TILES), st.data())
def test_tiles_cover_everything_and_meet_only_their_neighbours(
    tiles: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(2 * tiles, 1000))
    spans = tile_spans(length, tiles)
    assert (spans[0].start, spans[-1].stop) == (0, length)
    assert {span.stop - span.start for span in spans} == {tile_side(length, tiles)}
    assert all(a.start < b.start <= a.stop for a, b in pairwise(spans))
    assert all(a.stop <= b.start for a, b in zip(spans, spans[2:], strict=False))


def test_tiles_overlap_by_a_quarter() -> None:
    first, second = tile_spans(160, 2)
    assert (first, second) == (slice(0, 92), slice(68, 160))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("size", [(8, 8), (9, 16), (21, 13)])
def test_a_network_that_sees_one_pixel_is_put_together_exactly(
    tiles: int, size: tuple[int, int]
) -> None:
    x = mx.random.normal((2, *size, 3), key=mx.random.key(1))
    out = vae_tiles._run_tiled(lambda part: upsample2x(2 * part), x, tiles)
    assert np.allclose(out, upsample2x(2 * x), atol=rounding(1e-6))


def test_tiles_are_blended_linearly() -> None:
    parts = [mx.zeros((1, 1, 12, 1)), mx.ones((1, 1, 12, 1))]
    out = np.array(vae_tiles._blend(parts, [slice(0, 6), slice(4, 10)], axis=2)).ravel()
    assert np.allclose(out, [*[0] * 8, 0.125, 0.375, 0.625, 0.875, *[1] * 8])


@pytest.fixture(scope="module")
def bundled() -> tuple[VideoVAE, mx.array]:
    """The bundled VAE, and latents of a red disc on black, 128 x 128."""
    vae = load_vae(find_model("shapes"), ("encoder", "decoder"))
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    disc = ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.2)[..., None]
    picture = np.where(disc, [0.9, -0.8, -0.7], -0.9)
    return vae, vae.encode(mx.array(picture.astype(np.float32))[None, None])


def psnr(a: mx.array, b: mx.array) -> float:
    return 10 * math.log10(4 / float(((mx.clip(a, -1, 1) - mx.clip(b, -1, 1)) ** 2).mean()))


def test_close_to_the_whole_picture(bundled: tuple[VideoVAE, mx.array]) -> None:
    vae, z = bundled
    (whole,) = vae.decode_chunks(z, 1)
    (one,) = vae.decode_chunks(z, 1, tiles=1)
    assert mx.array_equal(one, whole)
    close = [psnr(next(vae.decode_chunks(z, 1, tiles=n)), whole) for n in TILES]
    assert 37 < close[0] < 60
    assert min(close) > 25  # tiles of a size that the VAE never saw
    # Norms of each tile's own would be far off: that is what the thinned-out picture is for.
    decoder = vae.spatial_vae.decoder
    x = decoder.decode_first_level(
        vae.spatial_vae.post_quant_conv(vae._decode_time(z, vae.chunks(1)[0], None))
    )
    assert psnr(vae_tiles._run_tiled(decoder.decode_upper_levels, x, 2), whole) < close[0] - 5


def small_vae() -> VideoVAE:
    """A random decoder in which pictures take far more memory than time does."""
    config = VAEConfig(
        spatial=SpatialVAEConfig(
            block_out_channels=(32, 32, 16), layers_per_block=1, norm_num_groups=4
        ),
        temporal=TemporalVAEConfig(
            filters=4, num_res_blocks=1, channel_multipliers=(1, 1, 1, 1), num_groups=2
        ),
    )
    vae = VideoVAE(config, ("decoder",))
    vae.update(mx_tree(networks.random_weights(vae, 3)))
    mx.eval(vae.parameters())
    return vae


def mx_tree(flat: dict[str, mx.array]) -> dict[str, object]:
    from mlx.utils import tree_unflatten

    return dict(tree_unflatten(list(flat.items())))


def test_every_way_of_streaming_gives_the_same_tiles() -> None:
    z = mx.random.normal((1, 7, 6, 8, 4), key=mx.random.key(7))
    plain = list(small_vae().decode_chunks(z, 22, tiles=2))
    assert [chunk.shape for chunk in plain] == [(17, 24, 32, 3), (5, 24, 32, 3)]
    for options in ({"sequential_offload": True}, {"micro_batch": 1}, {"micro_batch": 17}):
        chunks = small_vae().decode_chunks(z, 22, tiles=2, **options)  # type: ignore[arg-type]
        for a, b in zip(plain, chunks, strict=True):
            assert np.allclose(a, b, atol=rounding(1e-4))


def peak_of_decoding(vae: VideoVAE, z: mx.array, frames: int, **options: object) -> int:
    """MLX's peak while a clip is decoded chunk by chunk, beyond what was there before."""
    mx.eval(z)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert sum(map(len, vae.decode_chunks(z, frames, **options))) == frames  # type: ignore[arg-type]
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("tiles", TILES)
def test_tiles_take_less_memory(tiles: int) -> None:
    z = mx.random.normal((1, 1, 16, 24, 4), key=mx.random.key(2))
    whole, tiled = (peak_of_decoding(small_vae(), z, 1, tiles=n) for n in (1, tiles))
    # MLX runs ahead by a number of operations, and the fused ones of GPUs hold more each.
    assert tiled < (0.9 if ops.on_gpu() else 0.75, 0.6, 0.6)[tiles - 2] * whole


@pytest.mark.skipif(on_real_gpu(), reason="MLX runs ahead by commands")
@pytest.mark.parametrize("options", [{}, {"sequential_offload": True}], ids=str)
def test_the_peak_does_not_grow_with_the_clip(options: dict[str, object]) -> None:
    peaks = []
    for frames, latents in ((51, 15), (204, 60)):
        z = mx.random.normal((1, latents, 4, 4, 4), key=mx.random.key(2))
        # How far MLX runs ahead varies with what else the machine does; the least is the true one.
        runs = [
            peak_of_decoding(load_vae(find_model("shapes")), z, frames, **options) for _ in "ab"
        ]
        peaks.append(min(runs))
    assert peaks[1] < 1.05 * peaks[0]


def test_norms_are_their_own_again_whatever_happens() -> None:
    norm = GroupNorm(4, 2, 1e-6)
    x, other = (mx.random.normal((1, 5, 5, 4), key=mx.random.key(i)) for i in range(2))
    mean, variance = group_moments(other, 2)
    with use_moments(other, norm, [norm]):
        assert np.allclose(norm(x), (x - mean) * mx.rsqrt(variance + 1e-6), atol=rounding(1e-5))
    with pytest.raises(KeyError, match="half way"), use_moments(other, norm, [norm]):
        raise KeyError("half way")
    assert norm.moments is None
    assert abs(float(norm(x).mean())) < rounding(1e-5)


def test_one_tile_is_the_decoder_itself() -> None:
    vae = SpatialVAE(SpatialVAEConfig(block_out_channels=(8, 8), norm_num_groups=4), ("decoder",))
    z = mx.random.normal((1, 4, 4, 4), key=mx.random.key(1))
    assert mx.array_equal(decode_tiled(vae, z, 1), vae.decode(z))
