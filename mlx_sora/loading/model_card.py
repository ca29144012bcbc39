"""Model cards: what a model was trained to draw, as `card` in its model_index.json says it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from mlx_sora.errors import printable
from mlx_sora.geometry import Size, check_size, parse_frames

#: Most characters of a pattern or a phrase, and most entries of a list.
MAX_PHRASE, MAX_ENTRIES = 200, 1000

#: Words of a longer prompt match no pattern.
MAX_WORDS = 100

#: Most unknown words in a message.
_SHOWN_WORDS = 5

_ARTICLES = {"a", "an", "the"}

#: Numbers that any model takes or ignores.
_SCORES = re.compile(r"\b(aesthetic|motion) score: *[0-9.]+")


@dataclass(frozen=True)
class ModelCard:
    """Limits of what a model was trained to draw, and text about them. An empty field sets none.

    description: for people. patterns: forms of its prompts, the usual one first; a word in capitals
    stands for one of the phrases in `words`. differ: such words that never stand for the same
    phrase. prompts: some to try. sizes: WIDTHxHEIGHT, in pixels. num_frames: of one clip.
    """

    description: str = ""
    patterns: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    differ: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    num_frames: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelCard:
        """Return the card of `to_dict`. Raises MlxSoraError, ValueError and others if invalid."""
        found = asdict(cls()) | dict(content.items())
        phrases = {str(name): _phrases(values) for name, values in found["words"].items()}
        sizes = [check_size(*map(int, size.split("x"))) for size in _phrases(found["sizes"])]
        card = cls(
            printable(str(found["description"])),
            _phrases(found["patterns"]),
            phrases,
            _phrases(found["differ"]),
            _phrases(found["prompts"]),
            tuple(map(str, sizes)),
            tuple(map(parse_frames, _entries(found["num_frames"]))),
        )
        names = {*card.differ, *(word for line in card.patterns for word in _names(line))}
        if not names <= phrases.keys():
            raise ValueError("a word in capitals has no phrases")
        return card

    def to_dict(self) -> dict[str, Any]:
        """Return what the card says, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value}

    @cached_property
    def _forms(self) -> list[list[tuple[bool, list[tuple[str, ...]]]]]:
        """For each pattern, its words: True if it must differ, and the phrases it stands for."""
        phrases = {name: [tuple(_words(p)) for p in values] for name, values in self.words.items()}
        return [
            [(w in self.differ, phrases.get(w) or [(w,)]) for w in _words(pattern, self.words)]
            for pattern in self.patterns
        ]

    @cached_property
    def _vocabulary(self) -> set[str]:
        forms = (phrase for form in self._forms for _, phrases in form for phrase in phrases)
        return {word for phrase in forms for word in phrase}

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of `text` that training never showed."""
        if not self.patterns:
            return []
        return [w for w in dict.fromkeys(_words(text)) if w not in self._vocabulary]

    def fits(self, text: str) -> bool:
        """Return True if `text` has the form of one of the patterns, scores aside."""
        words = _words(text)
        return not self.patterns or any(_matches(form, words) for form in self._forms)

    def mismatches(
        self, prompts: Mapping[str, str], negative: str, size: Size, num_frames: int
    ) -> Iterator[str]:
        """Yield what the model was not trained for: prompts by their names, the size, the length.

        negative: the negative prompt, which has no form but should have known words.
        """
        for name, text in prompts.items():
            if unknown := self.unknown_words(text):
                yield f"{name} ({_listed(unknown)})"
            elif not self.fits(text):
                yield name
        if unknown := self.unknown_words(negative):
            yield f"the negative prompt ({_listed(unknown)})"
        if self.sizes and str(size) not in self.sizes:
            yield f"{size} pixels"
        if self.num_frames and num_frames not in self.num_frames:
            yield f"{num_frames} frames"

    def guide(self) -> str:
        """Return the description with the usual form of a prompt and its words, in one line."""
        lines = [self.description] if self.description else []
        if self.patterns:
            names = dict.fromkeys(_names(self.patterns[0]))
            lines += [f"Prompts: {self.patterns[0]}."]
            lines += [f"{name}: {', '.join(self.words[name])}." for name in names]
        return " ".join(lines)

    def examples(self, count: int) -> tuple[str, ...]:
        """Return the suggested prompts, then others that fit a pattern: `count`, always the same.

        Without patterns there are only those suggested.
        """
        found = dict.fromkeys(self.prompts)
        draw = random.Random(0)
        for _ in range(2 * count if self.patterns else 0):  # some come twice
            text, used = draw.choice(self.patterns), list[str]()
            for name in _names(text):
                free = [p for p in self.words[name] if name not in self.differ or p not in used]
                if not free:
                    break  # this pattern has no prompt
                used.append(draw.choice(free))
                text = text.replace(name, used[-1], 1)
            else:
                found[text] = None
        return tuple(found)[:count]

    def summary(self) -> str:
        """Return what the model draws, in one line."""
        parts = [f'"{self.patterns[0]}"'] if self.patterns else []
        parts += [f"at {join_words(self.sizes)} pixels"] if self.sizes else []
        parts += [f"of {join_words(self.num_frames)} frames"] if self.num_frames else []
        return ", ".join(parts)


def join_words(values: Sequence[object], word: str = "or") -> str:
    """Return `1, 17 or 34`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} {word} {last}" if first else last


def _listed(words: Sequence[str]) -> str:
    more = ", ..." if len(words) > _SHOWN_WORDS else ""
    return printable(", ".join(words[:_SHOWN_WORDS]), MAX_PHRASE) + more


def _words(text: str, names: Mapping[str, object] | None = None) -> list[str]:
    """Return the words of a text in small letters, without punctuation, articles and scores.

    names: words in capitals that stay so.
    """
    found = (word.strip(".,;:!?\"'") for word in _SCORES.sub("", text).split())
    words = (word if word in (names or {}) else word.lower() for word in found)
    return [word for word in words if word and word not in _ARTICLES]


def _names(pattern: str) -> list[str]:
    return re.findall(r"\b[A-Z][A-Z_]+\b", pattern)


def _matches(form: list[tuple[bool, list[tuple[str, ...]]]], words: list[str]) -> bool:
    """Return True if the words are phrases of the form, one after the other."""
    text = tuple(words[: MAX_WORDS + 1])
    # Ends of what fits so far, each with the phrases that must not come again.
    ends = {(0, frozenset[tuple[str, ...]]())}
    for differs, phrases in form:
        ends = {
            (end + len(phrase), used | {phrase} if differs else used)
            for end, used in ends
            for phrase in phrases
            if text[end : end + len(phrase)] == phrase and not (differs and phrase in used)
        }
    return any(end == len(words) for end, _ in ends)


def _entries(values: Any) -> list[Any]:
    if not isinstance(values, list | tuple) or len(values) > MAX_ENTRIES:
        raise TypeError("not a list")
    return list(values)


def _phrases(values: Any) -> tuple[str, ...]:
    found = _entries(values)
    if not all(isinstance(value, str) and value for value in found):
        raise TypeError("not a list of texts")
    return tuple(printable(value, MAX_PHRASE) for value in found)
