"""Mask strategies: which frames of which reference a generation keeps, written as text.

`loop,reference,reference_start,target_start,length,edit;...`; what is left off at the end of a
group has the default of `Placement`. Positions and lengths count latent frames. Mirrors the
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
    """In loop `loop`, put `length` latent frames of a reference into the video.

    reference_start, target_start: first frame taken and first frame written; negative counts from
    the end. edit: 0 keeps the frames, 1 generates them anew, between starts from them, noised.
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0

    def __str__(self) -> str:
        return ",".join(str(value) for value in astuple(self))


def parse_mask_strategy(text: str | None) -> list[MaskGroup]:
    """Placements of a mask strategy; none for an empty one. Raises UsageError."""
    groups = text.split(";") if text else []
    if len(groups) > MAX_LOOPS:
        raise UsageError(f"The mask strategy has {len(groups)} groups.", f"Give up to {MAX_LOOPS}.")
    return [_parse_group(group) for group in groups]


def append_generated(
    loops: Iterable[int], references: int, length: int, edit: float = 0.0
) -> list[MaskGroup]:
    """Begin each of `loops` with the last `length` latent frames of the clip before it.

    references: how many the sample has; the clips go behind them, one after the other.
    """
    return [
        MaskGroup(loop, behind, -length, 0, length, edit)
        for behind, loop in enumerate(loops, start=references)
    ]


def find_nearest_point(position: int, unit: int, limit: int) -> int:
    """`position` moved to the nearest multiple of `unit`: ties down, up only within `limit`.

    Chunks of the temporal VAE are independent, so that a clip must not start inside one. Up means
    to the start of the last whole unit of `limit` at most.
    """
    units, rest = divmod(position, unit)
    if 2 * rest > unit and units < limit // unit - 1:
        units += 1
    return units * unit


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
            f"Mask strategy {group!r} cannot be read.",
            "Write up to five whole numbers and an edit ratio: loop, reference, reference start, "
            "target start, length, edit.",
        ) from error
    return MaskGroup(*numbers, *edit)


@dataclass(frozen=True)
class LatentSpan:
    """Frames `source` of reference `reference` go to frames `target`; edit as in Placement."""

    reference: int
    source: range
    target: range
    edit_ratio: float


def resolve_mask_strategy(
    groups: Iterable[MaskGroup],
    loop: int,
    lengths: Sequence[int],
    frames: int,
    unit: int | None = None,
) -> list[LatentSpan]:
    """The placements of one loop; references have `lengths` latent frames, the clip has `frames`.

    Negative starts count from the end; unit: starts move to its multiples (see `align`). What
    reaches beyond either end is cut off. Raises UsageError for a reference that does not exist, and
    where nothing is left of it for frames that want something.
    """
    spans = []
    for placement in groups:
        if placement.loop != loop:
            continue
        if not -len(lengths) <= placement.reference < len(lengths):
            raise UsageError(
                f"The mask strategy {str(placement)!r} asks for reference {placement.reference} "
                f"of {len(lengths)}.",
                "References are counted from 0.",
            )
        length = lengths[placement.reference]
        source, target = placement.reference_start, placement.target_start
        source += length if source < 0 else 0
        target += frames if target < 0 else 0
        if unit is not None:
            source, target = (
                find_nearest_point(source, unit, length),
                find_nearest_point(target, unit, frames),
            )
        count = min(placement.length, frames - target, length - source)
        taken = range(length)[source : source + count]
        written = range(frames)[target : target + count]
        if len(taken) != len(written) and len(taken) != 1:
            raise UsageError(
                f"The mask strategy {str(placement)!r} reaches beyond its reference, "
                f"which has {length} latent frames.",
                f"Start at one of 0 to {length - 1}.",
            )
        spans.append(LatentSpan(placement.reference, taken, written, placement.edit_ratio))
    return spans


def apply_mask_strategy(
    z: mx.array, references: Sequence[mx.array], spans: Iterable[LatentSpan]
) -> tuple[mx.array, mx.array]:
    """Latents z [1, T, H, W, C] with `spans` of references [1, T', H, W, C], and the mask [1, T].

    The mask is as in `loop.Conditioning`: 1 where nothing is given.
    """
    z, mask = mx.array(z), mx.ones(z.shape[:2])
    for span in spans:
        if not span.target:
            continue
        source, target = _as_slice(span.source), _as_slice(span.target)
        z[:, target] = references[span.reference][:, source]
        mask[:, target] = span.edit_ratio
    return z, mask


def _as_slice(span: range) -> slice:
    return slice(span.start, span.stop)
