"""The shapes world: what exists in it, how it is captioned and how it is drawn (numpy only).

A video shows one coloured shape on a plain background: it moves left, right, up or down, stays
still, grows or shrinks; in a video longer than its motion it swings back and forth.  Frames are
[F, 64, 64, 3] uint8, coordinates are pixels (x right, y down).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE = 64
FPS = 24
CHUNK = 17

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 100, 240),
    "yellow": (245, 225, 50),
    "cyan": (50, 215, 225),
    "magenta": (230, 60, 200),
    "orange": (245, 140, 30),
    "purple": (125, 45, 185),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (8, 8, 8),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "navy": (18, 22, 80),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "still", "growing", "shrinking")

# Each motion as it reads after "that is ...": a participle, and as a verb; the first is canonical.
PARTICIPLES: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "moving to the left", "sliding left"),
    "right": ("moving right", "moving to the right", "sliding right"),
    "up": ("moving up", "moving upwards", "sliding up"),
    "down": ("moving down", "moving downwards", "sliding down"),
    "still": ("staying still", "standing still", "not moving"),
    "growing": ("growing", "growing larger", "getting bigger"),
    "shrinking": ("shrinking", "shrinking away", "getting smaller"),
}
VERBS: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "moves to the left", "slides left"),
    "right": ("moves right", "moves to the right", "slides right"),
    "up": ("moves up", "moves upwards", "slides up"),
    "down": ("moves down", "moves downwards", "slides down"),
    "still": ("stays still", "stands still", "does not move"),
    "growing": ("grows", "grows larger", "gets bigger"),
    "shrinking": ("shrinks", "shrinks away", "gets smaller"),
}

# Forms of captions, the canonical one first: MOTION is a participle, MOVES a verb.
PATTERNS = (
    "a COLOUR SHAPE MOTION on a BACKGROUND background",
    "a COLOUR SHAPE MOVES on a BACKGROUND background",
    "a COLOUR SHAPE MOVES over BACKGROUND",
    "on a BACKGROUND background, a COLOUR SHAPE MOVES",
    "a BACKGROUND background with a COLOUR SHAPE MOTION",
    "a COLOUR SHAPE on a BACKGROUND background, MOTION",
    "the COLOUR SHAPE MOVES on the BACKGROUND background",
    "COLOUR SHAPE MOTION, BACKGROUND background",
)

# Prompts to try.
EXAMPLES = (
    ("red", "circle", "right", "black"),
    ("blue", "square", "growing", "white"),
    ("green", "triangle", "up", "navy"),
    ("yellow", "circle", "still", "gray"),
)


@dataclass(frozen=True)
class Attributes:
    """What a video shows; every field is a key of the tables above."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def indices(self) -> tuple[int, int, int, int]:
        """(colour, shape, motion, background) as class numbers."""
        return (
            list(COLOURS).index(self.colour),
            SHAPES.index(self.shape),
            MOTIONS.index(self.motion),
            list(BACKGROUNDS).index(self.background),
        )


def all_attributes() -> list[Attributes]:
    """Every combination of the world; a white shape on white does not exist."""
    grid = itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    return [Attributes(*item) for item in grid if item[0] != item[3]]


def split(held_out: int = 96, seed: int = 20240617) -> tuple[list[Attributes], list[Attributes]]:
    """(training, held-out) combinations; every single attribute occurs on both sides."""
    rng = np.random.default_rng(seed)
    everything = all_attributes()
    order = rng.permutation(len(everything))
    test = [everything[i] for i in sorted(order[:held_out])]
    train = [everything[i] for i in sorted(order[held_out:])]
    return train, test


def caption(attributes: Attributes) -> str:
    """The canonical prompt, as in the README."""
    motion = attributes.motion
    return fill(PATTERNS[0], attributes, PARTICIPLES[motion][0], VERBS[motion][0])


def random_caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """A paraphrase, half of the time the canonical one; some end in score phrases."""
    a = attributes
    text = caption(a)
    if rng.random() < 0.5:
        doing, does = (table[a.motion][rng.integers(3)] for table in (PARTICIPLES, VERBS))
        text = fill(PATTERNS[rng.integers(len(PATTERNS))], a, doing, does)
    if rng.random() < 0.15:
        text += "."
    if rng.random() < 0.2:
        text += f" aesthetic score: {rng.uniform(4, 7.5):.1f}."
        if rng.random() < 0.4:
            text += f" motion score: {rng.uniform(0, 20):.1f}."
    return text


def fill(pattern: str, attributes: Attributes, doing: str, does: str) -> str:
    """One caption: the words of a pattern for the attributes."""
    a = attributes
    words = {"COLOUR": a.colour, "SHAPE": a.shape, "MOTION": doing, "MOVES": does}
    text = pattern
    for name, word in (words | {"BACKGROUND": a.background}).items():
        article = "an" if word[0] in "aeiou" else "a"
        text = text.replace(f"a {name}", f"{article} {word}").replace(name, word)
    return text


def model_card() -> dict[str, Any]:
    """The `card` of a model of this world: what it can draw."""
    return {
        "description": "Draws one coloured shape that moves on a plain background. "
        "It knows nothing else.",
        "patterns": list(PATTERNS),
        "words": {
            "COLOUR": list(COLOURS),
            "SHAPE": list(SHAPES),
            "MOTION": [word for words in PARTICIPLES.values() for word in words],
            "MOVES": [word for words in VERBS.values() for word in words],
            "BACKGROUND": list(BACKGROUNDS),
        },
        "differ": ["COLOUR", "BACKGROUND"],
        "prompts": [caption(Attributes(*words)) for words in EXAMPLES],
        "sizes": [f"{SIZE}x{SIZE}"],
        "num_frames": [1, *(CHUNK * chunks for chunks in (1, 2, 3, 4))],
    }


@dataclass(frozen=True)
class Path:
    """Centre (x, y) and half-size of the shape at the first and last frame, in pixels."""

    start: tuple[float, float]
    end: tuple[float, float]
    size_start: float
    size_end: float


def random_path(motion: str, rng: np.random.Generator) -> Path:
    """A trajectory for one motion; where a shape starts tells where it goes.

    That correlation puts the motion into the mean of the data, which a diffusion model learns
    long before it learns correlations.
    """
    middle = SIZE / 2
    size = rng.uniform(9.0, 13.0)
    x, y = middle + rng.uniform(-6, 6, size=2)
    if motion in ("growing", "shrinking"):
        small = rng.uniform(6.5, 8.0)
        large = small * rng.uniform(2.1, 2.3)
        pair = (small, large) if motion == "growing" else (large, small)
        return Path((x, y), (x, y), *pair)
    if motion == "still":
        return Path((x, y), (x, y), size, size)
    distance = rng.uniform(26.0, 34.0)
    slack = max(0.0, min(4.0, middle - distance / 2 - size))
    offset = rng.uniform(-slack, slack) if slack else 0.0
    sign = 1.0 if motion in ("right", "down") else -1.0
    first, last = middle + offset - sign * distance / 2, middle + offset + sign * distance / 2
    if motion in ("left", "right"):
        return Path((first, y), (last, y), size, size)
    return Path((x, first), (x, last), size, size)


#: A motion seen backwards; paths both ways are drawn from the same distribution.
BACKWARDS = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "still": "still",
    "growing": "shrinking",
    "shrinking": "growing",
}


def render(attributes: Attributes, path: Path, times: np.ndarray) -> np.ndarray:
    """Draw a video, uint8 [F, 64, 64, 3], antialiased, at F `times` from 0 (start) to 1 (end)."""
    step = np.asarray(times, np.float32)[:, None, None]
    x = path.start[0] + (path.end[0] - path.start[0]) * step
    y = path.start[1] + (path.end[1] - path.start[1]) * step
    size = path.size_start + (path.size_end - path.size_start) * step
    pixel = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    inside = np.clip(0.5 - _distance(attributes.shape, pixel - x, pixel[:, None] - y, size), 0, 1)
    colour = np.array(COLOURS[attributes.colour], np.float32)
    ground = np.array(BACKGROUNDS[attributes.background], np.float32)
    return np.rint(ground + (colour - ground) * inside[..., None]).astype(np.uint8)


def swing(frames: int, first: int, count: int) -> np.ndarray:
    """Times of `count` frames from frame `first` on, of a motion that takes `frames` of them.

    It goes there and back without end; either end shows for two frames, so that chunks never turn.
    """
    index = np.arange(first, first + count) % (2 * frames)
    return np.minimum(index, 2 * frames - 1 - index) / max(1, frames - 1)


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Signed distance to the outline [F, 64, 64]; sizes give the three shapes similar areas."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - size
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * size
    half = 1.15 * size
    slope = (2.0 * np.abs(dx) - (dy + half)) * np.float32(0.4472136)
    return np.maximum(dy - half, slope)


def random_clip(
    rng: np.random.Generator, choices: list[Attributes], frames: int
) -> tuple[Attributes, np.ndarray]:
    """One random video of the given combinations: (attributes, uint8 [frames, 64, 64, 3])."""
    attributes = choices[rng.integers(len(choices))]
    path = random_path(attributes.motion, rng)
    return attributes, render(attributes, path, np.linspace(0, 1, frames))
