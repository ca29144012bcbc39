"""Mask strategies: text that says which latent frames of which reference a clip starts from.

`loop,reference,reference_start,target_start,length,edit_ratio;...`; fields left off at the end of a
group have the defaults of `MaskGroup`. Positions and lengths count latent frames. Mirrors the
conditioning helpers of Open-Sora 1.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from math import isfinite

import mlx.core as mx

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_LOOPS


@dataclass(frozen=True)
class MaskGroup:
    """Copies `length` latent frames of a reference into the clip of loop `loop`.

    reference_start, target_start: first latent frame of the reference and of the clip; negative
    counts from the end. edit_ratio: 0 keeps the frames, 1 generates them, between starts from
    noised ones.
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0

    def __str__(self) -> str:
        return ",".join(str(value) for value in astuple(self))


@dataclass(frozen=True)
class LatentSpan:
    """Latent frames `source` of a reference that are copied to frames `target` of a clip."""

    reference: int
    source: range
    target: range
    edit_ratio: float


def parse_mask_strategy(text: str | None) -> list[MaskGroup]:
    """Parse a mask strategy into its groups; an empty one has none. Raises UsageError."""
    groups = text.split(";") if text else []
    if len(groups) > MAX_LOOPS:
        raise UsageError(f"The mask strategy has {len(groups)} groups.", f"Give up to {MAX_LOOPS}.")
    return [_parse_group(group) for group in groups]


def _parse_group(group: str) -> MaskGroup:
    fields = group.split(",")
    try:
        if len(fields) > 6:
            raise ValueError
        numbers = [int(field) for field in fields[:5]]
        edit = [float(field) for field in fields[5:]]
        if not all(map(isfinite, edit)):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"Cannot parse mask strategy {group!r}.",
            "Write up to five whole numbers and an edit ratio: loop, reference, reference start, "
            "target start, length, edit.",
        ) from error
    return MaskGroup(*numbers, *edit)


def append_generated(
    loops: Iterable[int], references: int, length: int, edit: float = 0.0
) -> list[MaskGroup]:
    """Make each of `loops` start with the last `length` latent frames of the clip before it.

    references: number of references; generated clips follow them.
    """
    return [
        MaskGroup(loop, behind, -length, 0, length, edit)
        for behind, loop in enumerate(loops, start=references)
    ]


def find_nearest_point(position: int, unit: int, limit: int) -> int:
    """Move `position` to the nearest multiple of `unit`, up only to the last whole unit of `limit`.

    Ties move down. Chunks of the temporal VAE are independent, so a clip must not start inside one.
    """
    units, rest = divmod(position, unit)
    if 2 * rest > unit and units < limit // unit - 1:
        units += 1
    return units * unit


def resolve_mask_strategy(
    groups: Iterable[MaskGroup],
    loop: int,
    lengths: Sequence[int],
    frames: int,
    unit: int | None = None,
) -> list[LatentSpan]:
    """Return the spans of one loop. Parts beyond either end are cut off.

    Args:
        lengths: latent frames of each reference.
        frames: latent frames of the clip.
        unit: align starts to its multiples (see `find_nearest_point`).

    Raises UsageError for a reference that does not exist or has too few frames.
    """
    spans = []
    for group in groups:
        if group.loop != loop:
            continue
        if not -len(lengths) <= group.reference < len(lengths):
            raise UsageError(
                f"The mask strategy {str(group)!r} names reference {group.reference}, but "
                f"{len(lengths)} are given.",
                "References are counted from 0.",
            )
        length = lengths[group.reference]
        start, target_start = group.reference_start, group.target_start
        start += length if start < 0 else 0
        target_start += frames if target_start < 0 else 0
        if unit is not None:
            start = find_nearest_point(start, unit, length)
            target_start = find_nearest_point(target_start, unit, frames)
        count = min(group.length, frames - target_start, length - start)
        source = range(length)[start : start + count]
        target = range(frames)[target_start : target_start + count]
        if len(source) != len(target) and len(source) != 1:
            raise UsageError(
                f"The mask strategy {str(group)!r} starts beyond its reference, "
                f"which has {length} latent frames.",
                f"Start at 0 to {length - 1}.",
            )
        spans.append(LatentSpan(group.reference, source, target, group.edit_ratio))
    return spans


def apply_mask_strategy(
    z: mx.array, references: Sequence[mx.array], spans: Iterable[LatentSpan]
) -> tuple[mx.array, mx.array]:
    """Copy `spans` of references [1, T', H, W, C] into latents z [1, T, H, W, C].

    Returns the latents and their mask [1, T] as in `loop.Conditioning`: 1 where z is kept.
    """
    z, mask = mx.array(z), mx.ones(z.shape[:2])
    for span in spans:
        if span.target:
            source = slice(span.source.start, span.source.stop)
            target = slice(span.target.start, span.target.stop)
            z[:, target] = references[span.reference][:, source]
            mask[:, target] = span.edit_ratio
    return z, mask
