"""Putting latent frames of references into the latents a run begins with; whole numbers first.

Mirrors apply_mask_strategy of Open-Sora 1.2. Dimension letters as in `base`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.errors import UsageError
from mlx_sora.text.conditioning import Placement, align


@dataclass(frozen=True)
class Span:
    """Frames `source` of reference `reference` go to frames `target`; edit as in Placement."""

    reference: int
    source: range
    target: range
    edit: float


def resolve(
    placements: Iterable[Placement],
    loop: int,
    lengths: Sequence[int],
    frames: int,
    unit: int | None = None,
) -> list[Span]:
    """The placements of one loop; references have `lengths` latent frames, the clip has `frames`.

    Negative starts count from the end; unit: starts move to its multiples (see `align`). What
    reaches beyond either end is cut off. Raises UsageError for a reference that does not exist, and
    where nothing is left of it for frames that want something.
    """
    spans = []
    for placement in placements:
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
            source, target = align(source, unit, length), align(target, unit, frames)
        count = min(placement.length, frames - target, length - source)
        taken = range(length)[source : source + count]
        written = range(frames)[target : target + count]
        if len(taken) != len(written) and len(taken) != 1:
            raise UsageError(
                f"The mask strategy {str(placement)!r} reaches beyond its reference, "
                f"which has {length} latent frames.",
                f"Start at one of 0 to {length - 1}.",
            )
        spans.append(Span(placement.reference, taken, written, placement.edit))
    return spans


def place(
    z: mx.array, references: Sequence[mx.array], spans: Iterable[Span]
) -> tuple[mx.array, mx.array]:
    """Latents z [1, T, H, W, C] with `spans` of references [1, T', H, W, C], and the mask [1, T].

    The mask is as in `loop.Conditioning`: 1 where nothing is given.
    """
    z, mask = mx.array(z), mx.ones(z.shape[:2])
    for span in spans:
        if not span.target:
            continue
        source, target = _slice(span.source), _slice(span.target)
        z[:, target] = references[span.reference][:, source]
        mask[:, target] = span.edit
    return z, mask


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
