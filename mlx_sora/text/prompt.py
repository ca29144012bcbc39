"""Prompt syntax of Open-Sora 1.2: scores, scenes and settings written into the prompt.

A prompt may read `|0|a village|2|spring comes{"reference_path": "a.png", "mask_strategy": "0"}`:
two scenes, the second from loop 2 on, with the material that conditions them. In order: take the
settings off, split the scenes, append the scores, clean each scene, pick the scene of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_LOOPS
from mlx_sora.text.cleaning import preprocess
from mlx_sora.utils.json import parse_object

_DIRECTIVES = ("reference_path", "mask_strategy")


@dataclass(frozen=True)
class Scene:
    """A text and the loop of the generation that it starts at."""

    start: int
    text: str


@dataclass(frozen=True)
class PromptDirectives:
    """Conditioning a prompt carries: paths joined by ';', and a mask strategy. None: not given."""

    reference_path: str | None = None
    mask_strategy: str | None = None


@dataclass(frozen=True)
class Scores:
    """Properties of the video in the words of the training captions; None leaves one out.

    aesthetic: around 4 (poor) to 7 (excellent). motion: larger moves more. camera: "pan left", ...
    """

    aesthetic: float | None = None
    motion: float | None = None
    camera: str | None = None

    def append_to(self, text: str) -> str:
        """`text` with a phrase per score, unless it already has one of the kind."""
        phrases = (
            ("aesthetic score:", None if self.aesthetic is None else f"{self.aesthetic:.1f}"),
            ("motion score:", None if self.motion is None else f"{self.motion:.1f}"),
            ("camera motion:", self.camera),
        )
        added = [
            f" {name} {value}." for name, value in phrases if value is not None and name not in text
        ]
        return text + "".join(added)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the tokenizer. A plain prompt is one scene from loop 0 on.

    is_empty: cleaning left nothing of the first scene.
    """

    scenes: tuple[Scene, ...]
    directives: PromptDirectives = PromptDirectives()
    is_empty: bool = False

    def text(self, loop: int = 0) -> str:
        """Return the text of generation number `loop`."""
        return scene_at(self.scenes, loop)


def prepare_prompt(prompt: str, scores: Scores | None = None) -> Prompt:
    """Parse the syntax of a prompt as the user typed it, append the scores and clean the texts.

    Raises UsageError for settings or scenes that cannot be read.
    """
    text, settings = split_directives(prompt)
    scores = scores or Scores()
    typed = split_scenes(text)
    scenes = (
        Scene(scene.start, preprocess(scores.append_to(scene.text.strip()))) for scene in typed
    )
    return Prompt(tuple(scenes), settings, is_empty=not preprocess(scene_at(typed, 0).strip()))


def split_directives(prompt: str) -> tuple[str, PromptDirectives]:
    """Text and settings of a prompt that may end in one flat JSON object.

    Raises UsageError for broken JSON, a second object, an unknown key, a value that is no string.
    """
    text, brace, rest = prompt.partition("{")
    if not brace:
        return text, PromptDirectives()
    example = '{"reference_path": "a.png", "mask_strategy": "0"}'
    fix = f"Braces hold settings, such as {example} at the end; remove them otherwise."
    if "{" in rest:
        raise UsageError(f"More than one '{{' in the prompt: {prompt!r}.", fix)
    try:
        values = parse_object(brace + rest)
    except ValueError as error:
        raise UsageError(f"Settings of the prompt are not JSON: {brace + rest!r}.", fix) from error
    for key, value in values.items():
        if key not in _DIRECTIVES:
            raise UsageError(f"Unknown setting {key!r}.", f"Choose of {', '.join(_DIRECTIVES)}.")
        if value is not None and not isinstance(value, str):
            raise UsageError(f"Setting {key!r} is {value!r}, not a text.", fix)
    return text, PromptDirectives(**values)


def split_scenes(text: str) -> list[Scene]:
    """Scenes of `|0|one|2|another`, their texts as typed; a text without marks is one scene.

    Raises UsageError for a start that is no whole number or has no text.
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
            f"Scenes cannot be read from {text!r}.",
            "Write |0|first text|2|second text, with a whole number between each pair of bars.",
        ) from error


def scene_at(scenes: Sequence[Scene], loop: int) -> str:
    """Text of loop `loop`: each scene lasts until the start of the next one, the last for ever.

    Starts out of order are laid end to end, as Open-Sora does: a scene whose successor starts
    no later lasts for no loop, and what follows keeps its own length.
    """
    ends = [scene.start for scene in scenes[1:]] + [loop + 1]
    position = 0
    for scene, end in zip(scenes, ends, strict=True):
        position += max(0, end - scene.start)
        if position > loop:
            return scene.text
    raise UsageError(f"No scene covers loop {loop}.", "Start the first scene at 0.")
