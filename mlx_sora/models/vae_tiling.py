"""Tiled decoding of large images: an approximation that saves memory.

Attention and the first level run on the whole image. The other levels, whose activations are up
to 16 times larger, run on overlapping tiles that are blended linearly. Group norms of a tile use
mean and variance of the image subsampled to every `tiles`-th row and column, because those of a
tile depend on its content. Dimension letters: N images, h, w latent rows and columns, H, W those of
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import mlx.core as mx

from mlx_sora.models.conv import GroupNorm, Moments, group_moments
from mlx_sora.models.vae_spatial import SpatialVAE

#: Share of a tile that overlaps the next.
OVERLAP = 0.25

Network = Callable[[mx.array], mx.array]


def tile_side(length: int, tiles: int) -> int:
    """Return the rows or columns of each of `tiles` overlapping tiles that cover `length`."""
    return min(length, -int(-length // (1 + (1 - OVERLAP) * (tiles - 1))))


def tile_spans(length: int, tiles: int) -> list[slice]:
    """Return the spans of equal tiles, evenly spaced from the first row or column to the last."""
    side = tile_side(length, tiles)
    starts = [round(i * (length - side) / max(tiles - 1, 1)) for i in range(tiles)]
    return [slice(start, start + side) for start in starts]


def tiling_cost(rows: int, columns: int, tiles: int) -> float:
    """Return the work on the tiles and the subsampled image, relative to untiled work."""
    if tiles == 1:
        return 1.0
    covered = tiles**2 * tile_side(rows, tiles) * tile_side(columns, tiles)
    return covered / (rows * columns) + 1 / tiles**2


def decode_tiled(vae: SpatialVAE, z: mx.array, tiles: int) -> mx.array:
    """Decode z in `tiles` x `tiles` tiles; approximates vae.decode(z), and equals it for one tile.

    Latents [N, h, w, C] to frames [N, H, W, 3]; evaluated tile by tile.
    """
    if tiles == 1:
        return vae.decode(z)
    decoder = vae.decoder
    x = decoder.decode_first_level(vae.post_quant_conv(z))
    mx.eval(x)
    with use_moments(_subsample(x, tiles), decoder.decode_upper_levels, _upper_level_norms(vae)):
        return _run_tiled(decoder.decode_upper_levels, x, tiles)


@contextmanager
def use_moments(x: mx.array, network: Network, norms: Sequence[GroupNorm]) -> Iterator[None]:
    """Make `norms` of `network` use the mean and variance that they see in network(x)."""
    recorded: dict[int, Moments] = {}

    def record(index: int, x: mx.array, groups: int) -> Moments:
        recorded[index] = group_moments(x, groups)
        return recorded[index]

    def replay(index: int, x: mx.array, groups: int) -> Moments:
        return recorded[index]

    try:
        for index, norm in enumerate(norms):
            norm.moments = partial(record, index)
        mx.eval(network(x))
        mx.eval(recorded)
        for index, norm in enumerate(norms):
            norm.moments = partial(replay, index)
        yield
    finally:
        for norm in norms:
            norm.moments = None


def _upper_level_norms(vae: SpatialVAE) -> list[GroupNorm]:
    decoder = vae.decoder
    modules = [module for block in decoder.up_blocks[1:] for module in block.modules()]
    return [m for m in (*modules, decoder.conv_norm_out) if isinstance(m, GroupNorm)]


def _subsample(x: mx.array, tiles: int) -> mx.array:
    """Take the middle one of every `tiles` rows and columns."""
    rows, columns = (mx.arange(tiles // 2, n, tiles) for n in x.shape[-3:-1])
    return x[:, rows][:, :, columns]


def _run_tiled(network: Network, x: mx.array, tiles: int) -> mx.array:
    """Apply in tiles a network that enlarges [N, h, w, C] by a whole number."""
    rows, columns = (tile_spans(n, tiles) for n in x.shape[1:3])
    strips = []
    for row in rows:
        parts = []
        for column in columns:
            parts.append(network(x[:, row, column]))
            mx.eval(parts[-1])
        strips.append(_blend(parts, columns, axis=2))
        mx.eval(strips[-1])
        del parts
    return _blend(strips, rows, axis=1)


def _blend(parts: Sequence[mx.array], spans: Sequence[slice], axis: int) -> mx.array:
    """Join neighbours along `axis`, blended linearly where they overlap."""
    scale = parts[0].shape[axis] // (spans[0].stop - spans[0].start)
    out, pieces = parts[0], []
    for (before, after), part in zip(pairwise(spans), parts[1:], strict=True):
        overlap = scale * (before.stop - after.start)
        head, a = mx.split(out, [out.shape[axis] - overlap], axis)
        b, out = mx.split(part, [overlap], axis)
        ramp = ((mx.arange(overlap) + 0.5) / overlap).reshape(overlap, *[1] * (3 - axis))
        pieces += [head, a + ramp * (b - a)]
    return mx.concatenate([*pieces, out], axis)
