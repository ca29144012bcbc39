"""Reads colour, shape, motion and background from the frames alone (numpy only).

The scorer never sees the prompt.  It separates the shape from the background by colour and
measures its mean colour, centre, area and outline over time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.shapes.world import BACKGROUNDS, COLOURS, SHAPES, Attributes

FOREGROUND_DISTANCE = 45.0
MIN_PIXELS = 40
MOVE_PIXELS = 12.0
GROWTH = 1.8


@dataclass(frozen=True)
class Reading:
    """What a video shows; None where nothing can be told (no shape, ambiguous motion)."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None


def read_video(frames: np.ndarray) -> Reading:
    """Classify a video, uint8 [F, H, W, 3]."""
    video = frames.astype(np.float32)
    ground = _ground(video)
    background = _nearest(ground, BACKGROUNDS)
    masks = shape_masks(frames)
    areas = masks.sum((1, 2))
    if np.median(areas) < MIN_PIXELS:
        return Reading(None, None, None, background)
    colour = _nearest(np.median(video[_inner(masks)], axis=0), COLOURS)
    return Reading(colour, _shape(masks), _motion(masks, areas), background)


def _ground(video: np.ndarray) -> np.ndarray:
    edges = (video[:, :2], video[:, -2:], video[:, :, :2], video[:, :, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def shape_masks(frames: np.ndarray) -> np.ndarray:
    """Where the shape is, bool [F, H, W], in a video, uint8 [F, H, W, 3]."""
    video = frames.astype(np.float32)
    masks = np.linalg.norm(video - _ground(video), axis=-1) > FOREGROUND_DISTANCE
    return np.stack([_largest_part(mask) for mask in masks])


def _nearest(value: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: float(np.linalg.norm(value - np.array(table[name]))))


def _inner(masks: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are foreground too: free of the antialiased edge."""
    inner = masks.copy()
    inner[:, 1:] &= masks[:, :-1]
    inner[:, :-1] &= masks[:, 1:]
    inner[:, :, 1:] &= masks[:, :, :-1]
    inner[:, :, :-1] &= masks[:, :, 1:]
    return inner if inner.any() else masks


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a mask [H, W], by spreading the highest label."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        near = np.maximum.reduce(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels]
        )
        spread = np.where(mask, near, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == counts.argmax() if counts.any() else mask


def _motion(masks: np.ndarray, areas: np.ndarray) -> str | None:
    """From the change of centre and area between the first and last quarter of the clip."""
    rows, columns = np.mgrid[: masks.shape[1], : masks.shape[2]]
    weight = np.maximum(areas, 1)
    x, y = (masks * columns).sum((1, 2)) / weight, (masks * rows).sum((1, 2)) / weight
    span = max(1, len(areas) // 4)

    def change(series: np.ndarray) -> float:
        return float(series[-span:].mean() - series[:span].mean())

    dx, dy = change(x), change(y)
    ratio = float(areas[-span:].mean() / max(1.0, areas[:span].mean()))
    if max(abs(dx), abs(dy)) >= MOVE_PIXELS:
        if min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
            return None
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    if ratio >= GROWTH:
        return "growing"
    if ratio <= 1 / GROWTH:
        return "shrinking"
    calm = max(abs(dx), abs(dy)) <= MOVE_PIXELS / 2 and 1 / 1.35 <= ratio <= 1.35
    return "still" if calm else None


def _shape(masks: np.ndarray) -> str | None:
    """Vote of the frames in which the shape is whole, by how the rows' widths change."""
    votes = dict.fromkeys(SHAPES, 0)
    for mask in masks:
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        if len(rows) < 6 or len(columns) < 6:
            continue
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        votes[_outline(box)] += 1
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else None


def _outline(box: np.ndarray) -> str:
    """Shape of a mask cut to its bounding box [h, w]."""
    height = len(box)
    fill = box.mean()
    widths = box.sum(1) / box.shape[1]
    third = max(1, height // 3)
    top, bottom = widths[:third].mean(), widths[-third:].mean()
    if bottom - top > 0.3 and fill < 0.72:
        return "triangle"
    return "square" if fill > 0.89 else "circle"


FIELDS = ("colour", "background", "motion", "shape")


def score(readings: Iterable[Reading], truths: Iterable[Attributes]) -> dict[str, float]:
    """Share of videos in which each attribute, and all of them, came out as asked."""
    rows = [
        [getattr(reading, field) == getattr(truth, field) for field in FIELDS]
        for reading, truth in zip(readings, truths, strict=True)
    ]
    hits = np.array(rows, float)
    table = dict(zip(FIELDS, hits.mean(0).tolist(), strict=True))
    return table | {"all": float(hits.all(1).mean())}
