"""The image decoder on a large picture tile by tile, an approximation that saves memory.

Attention and the first level see the whole picture. The levels behind it, whose activations are up
to 16 times larger, run on overlapping tiles that are blended linearly. Group norms of a tile use
mean and variance of a thinned-out whole picture (every `tiles`-th row and column), because those of
the tile alone depend on what it happens to show. Dimension letters: N images, h, w latent rows and
columns, H, W those of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import mlx.core as mx

from mlx_sora.models.conv import GroupNorm, Moments, group_moments
from mlx_sora.models.vae_spatial import SpatialVAE

#: Share of a tile that it has in common with the next.
OVERLAP = 0.25

Network = Callable[[mx.array], mx.array]


def tile_side(length: int, tiles: int) -> int:
    """Rows or columns of each of `tiles` overlapping tiles that cover `length` of them."""
    return min(length, -int(-length // (1 + (1 - OVERLAP) * (tiles - 1))))


def tile_spans(length: int, tiles: int) -> list[slice]:
    """Where the tiles lie: of one size, evenly spread, from the first row or column to the last."""
    side = tile_side(length, tiles)
    starts = [round(i * (length - side) / max(tiles - 1, 1)) for i in range(tiles)]
    return [slice(start, start + side) for start in starts]


def tiling_cost(rows: int, columns: int, tiles: int) -> float:
    """Work on the tiles of `rows` x `columns` and on the thinned-out picture, over untiled work."""
    if tiles == 1:
        return 1.0
    covered = tiles**2 * tile_side(rows, tiles) * tile_side(columns, tiles)
    return covered / (rows * columns) + 1 / tiles**2


def decode_tiled(vae: SpatialVAE, z: mx.array, tiles: int) -> mx.array:
    """vae.decode(z), approximately, in `tiles` x `tiles` tiles; exact for one.

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
    """In the block, `norms` of `network` use the mean and variance that they see in network(x)."""
    found: dict[int, Moments] = {}

    def note(place: int) -> Callable[[mx.array, int], Moments]:
        def moments(x: mx.array, groups: int) -> Moments:
            found[place] = group_moments(x, groups)
            return found[place]

        return moments

    def recall(place: int) -> Callable[[mx.array, int], Moments]:
        return lambda x, groups: found[place]

    try:
        for place, norm in enumerate(norms):
            norm.moments = note(place)
        mx.eval(network(x))
        mx.eval(found)
        for place, norm in enumerate(norms):
            norm.moments = recall(place)
        yield
    finally:
        for norm in norms:
            norm.moments = None


def _upper_level_norms(vae: SpatialVAE) -> list[GroupNorm]:
    """Norms of `finish`."""
    decoder = vae.decoder
    modules = [module for block in decoder.up_blocks[1:] for module in block.modules()]
    return [m for m in (*modules, decoder.conv_norm_out) if isinstance(m, GroupNorm)]


def _subsample(x: mx.array, tiles: int) -> mx.array:
    """The middle one of every `tiles` rows and columns."""
    rows, columns = (mx.arange(tiles // 2, n, tiles) for n in x.shape[-3:-1])
    return x[:, rows][:, :, columns]


def _run_tiled(network: Network, x: mx.array, tiles: int) -> mx.array:
    """network(x) for a network that enlarges [N, h, w, C] by a whole number, put together."""
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
    """Neighbours in a row along `axis`, blended linearly where they overlap."""
    scale = parts[0].shape[axis] // (spans[0].stop - spans[0].start)
    out, pieces = parts[0], []
    for (before, after), part in zip(pairwise(spans), parts[1:], strict=True):
        shared = scale * (before.stop - after.start)
        alone, a = mx.split(out, [out.shape[axis] - shared], axis)
        b, out = mx.split(part, [shared], axis)
        ramp = ((mx.arange(shared) + 0.5) / shared).reshape(shared, *[1] * (3 - axis))
        pieces += [alone, a + ramp * (b - a)]
    return mx.concatenate([*pieces, out], axis)
