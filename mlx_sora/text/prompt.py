"""Prompt syntax of Open-Sora 1.2: scores, scenes, and settings inside the prompt; segments.

Example: `|0|a village|2|spring comes{"reference_path": "a.png", "mask_strategy": "0"}` has two
scenes, the second from loop 2 on, and the media that condition them. Settings are split off first,
then scenes. Scores are appended to each scene before it is cleaned.

A scene, or a prompt without scenes, that begins with a range of frames from 0 on has segments:
`[0-17] a red circle [17-34] a blue square` shows the first in frames 0 to 16. Brackets elsewhere
are text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_LOOPS
from mlx_sora.text.cleaning import preprocess
from mlx_sora.utils.json import parse_object

#: A range of frames before the text of a segment, and most segments of a scene.
_RANGE = re.compile(r"\[([0-9]{1,6})-([0-9]{1,6})\]")
MAX_SEGMENTS = 100

_DIRECTIVES = ("reference_path", "mask_strategy")

#: Phrases of the training captions before the scores, by option.
SCORE_PHRASES = {
    "aesthetic": "aesthetic score:",
    "motion": "motion score:",
    "camera": "camera motion:",
}


@dataclass(frozen=True)
class Scene:
    """A text and the loop at which it starts."""

    start: int
    text: str


@dataclass(frozen=True)
class Segment:
    """A text and the frames of a clip that it describes, from `start` to before `stop`.

    subject: the text without scores.
    """

    start: int
    stop: int
    text: str
    subject: str

    def __str__(self) -> str:
        return f"[{self.start}-{self.stop}] {self.text}"


@dataclass(frozen=True)
class PromptDirectives:
    """Conditioning inside a prompt: paths joined by ';' and a mask strategy. None if absent.

    "" replaces what the request has by nothing. So does null in the prompt, as in Open-Sora.
    """

    reference_path: str | None = None
    mask_strategy: str | None = None

    @property
    def references(self) -> tuple[str, ...] | None:
        """Paths of `reference_path`, with ~ expanded."""
        if self.reference_path is None:
            return None
        return tuple(map(os.path.expanduser, filter(None, self.reference_path.split(";"))))


@dataclass(frozen=True)
class Scores:
    """Properties of the video in the words of the training captions; None omits one.

    aesthetic: about 4 (poor) to 7 (excellent). motion: larger moves more. camera: "pan left", ...
    """

    aesthetic: float | None = None
    motion: float | None = None
    camera: str | None = None

    def append_to(self, text: str) -> str:
        """Append a phrase per score to `text`, unless it has one of that kind."""
        values = {
            "aesthetic": None if self.aesthetic is None else f"{self.aesthetic:.1f}",
            "motion": None if self.motion is None else f"{self.motion:.1f}",
            "camera": self.camera,
        }
        added = [
            f" {phrase} {values[name]}."
            for name, phrase in SCORE_PHRASES.items()
            if values[name] is not None and phrase not in text
        ]
        return text + "".join(added)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the tokenizer. A plain prompt is one scene from loop 0 on.

    subjects: the texts of the scenes without scores; cleaning may leave nothing of one. segments:
    those of a scene, by its text.
    """

    scenes: tuple[Scene, ...]
    subjects: tuple[str, ...]
    directives: PromptDirectives = PromptDirectives()
    segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[Segment, ...]]:
        """Yield the segments of each scene; a scene without any is one, of no frames."""
        for scene, subject in zip(self.scenes, self.subjects, strict=True):
            yield self.segments.get(scene.text) or (Segment(0, 0, scene.text, subject),)

    def text(self, loop: int = 0) -> str:
        """Return the text of loop `loop`."""
        return scene_at(self.scenes, loop)


def prepare_prompt(prompt: str, scores: Scores | None = None) -> Prompt:
    """Parse the syntax of a prompt, append the scores and clean the texts.

    Raises UsageError for settings or scenes that cannot be parsed.
    """
    text, directives = split_directives(prompt)
    scores, clean = scores or Scores(), cache(preprocess)
    scenes, subjects, segments = list[Scene](), list[str](), dict[str, tuple[Segment, ...]]()
    for scene in split_scenes(text):
        parts = tuple(
            Segment(start, stop, clean(scores.append_to(body)), clean(body))
            for start, stop, body in split_segments(scene.text)
        )
        body = scene.text.strip()
        subject = clean(body)
        cleaned = " ".join(map(str, parts)) if parts else clean(scores.append_to(body))
        scenes.append(Scene(scene.start, cleaned))
        subjects.append(subject)
        if parts:
            segments[cleaned] = parts
    return Prompt(tuple(scenes), tuple(subjects), directives, segments)


def split_directives(prompt: str) -> tuple[str, PromptDirectives]:
    """Split a prompt into its text and the flat JSON object at its end, if there is one.

    Raises UsageError for broken JSON, a second object, an unknown key, or a value that is not a
    string.
    """
    text, brace, rest = prompt.partition("{")
    if not brace:
        return text, PromptDirectives()
    example = '{"reference_path": "a.png", "mask_strategy": "0"}'
    fix = f"Use braces only for settings at the end, such as {example}."
    if "{" in rest:
        raise UsageError(f"More than one '{{' in the prompt: {prompt!r}.", fix)
    try:
        values = parse_object(brace + rest)
    except ValueError as error:
        raise UsageError(f"Settings in the prompt are not JSON: {brace + rest!r}.", fix) from error
    for key, value in values.items():
        if key not in _DIRECTIVES:
            known = " or ".join(_DIRECTIVES)
            raise UsageError(f"Unknown setting {key!r} in the prompt.", f"Use {known}.")
        if value is not None and not isinstance(value, str):
            raise UsageError(f"Setting {key!r} must be a string, not {value!r}.", fix)
    return text, PromptDirectives(**{key: value or "" for key, value in values.items()})


def split_scenes(text: str) -> list[Scene]:
    """Split `|0|one|2|another` into scenes; a text without marks is one scene.

    Raises UsageError for a start that is not a whole number or has no text.
    """
    if not text.startswith("|0|"):
        return [Scene(0, text)]
    marks = text.split("|")[1:]
    if len(marks) > 2 * MAX_LOOPS:
        raise UsageError(f"The prompt has {len(marks) // 2} scenes.", f"Give up to {MAX_LOOPS}.")
    try:
        return [
            Scene(int(start), body) for start, body in zip(marks[::2], marks[1::2], strict=True)
        ]
    except ValueError as error:
        raise UsageError(
            f"Cannot split {text!r} into scenes.",
            "Write |0|first text|2|second text, with a whole number between each pair of bars.",
        ) from error


def split_segments(text: str) -> list[tuple[int, int, str]]:
    """Split `[0-17] one [17-34] another` into first frame, frame after the last, and text.

    A text that does not begin with a range from 0 on has none. Raises UsageError for ranges that do
    not follow one another, and for one without text.
    """
    opening = _RANGE.match(text.lstrip())
    if opening is None or int(opening[1]):
        return []
    _, *marks = _RANGE.split(text)
    fix = "Write [0-17] first text [17-34] second text: each begins at the frame where one ends."
    found = list[tuple[int, int, str]]()
    for start, stop, body in zip(marks[::3], marks[1::3], marks[2::3], strict=True):
        if int(start) != (found[-1][1] if found else 0) or int(stop) <= int(start):
            raise UsageError(f"Frames [{start}-{stop}] of the prompt do not follow.", fix)
        if not body.strip():
            raise UsageError(f"Frames [{start}-{stop}] of the prompt have no text.", fix)
        found.append((int(start), int(stop), body.strip()))
    if len(found) > MAX_SEGMENTS:
        few = f"Give up to {MAX_SEGMENTS}."
        raise UsageError(f"The prompt has {len(found)} ranges of frames.", few)
    return found


def first_loops(scenes: Sequence[Scene]) -> list[int | None]:
    """Return the loop in which each scene begins; None for one that has no loop."""
    found: list[int | None] = []
    position = 0
    for scene, following in zip(scenes, [*scenes[1:], None], strict=True):
        length = 1 if following is None else max(0, following.start - scene.start)
        found.append(position if length else None)
        position += length
    return found


def scene_at(scenes: Sequence[Scene], loop: int) -> str:
    """Return the text of a loop: each scene lasts until the next one starts, the last forever.

    Starts that do not increase are laid end to end, as Open-Sora does: a scene whose successor
    starts no later has no loops, and the next one keeps its own length.
    """
    ends = [scene.start for scene in scenes[1:]] + [loop + 1]
    position = 0
    for scene, end in zip(scenes, ends, strict=True):
        position += max(0, end - scene.start)
        if position > loop:
            return scene.text
    raise UsageError(f"The prompt has no scene for loop {loop}.", "Start the first scene at 0.")
