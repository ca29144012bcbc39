"""Messages for Python: flags in them become keywords.

Messages are written for the command line. `in_keywords` is the one place that rewords them for the
Python API: `--num-frames 51` becomes num_frames=51.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlx_sora.request.options import Option, as_float, as_int

#: Flags of the command line that are no options, and what does the same in Python.
_OTHERS = {
    "dry-run": "pipe.plan",
    "inject-steps": "inject_steps",
    "prompt-file": "pipe.stream_all",
    "resume": "pipe.resume",
    "source-prompt": "source_prompt",
}

#: A flag and the word after it, without the punctuation behind it.
_FLAG = re.compile(
    r"(?<![\w-])--(?P<flag>[a-z][a-z0-9-]*)(?:[ =](?P<word>'[^']*'|[^\s']*[^\s',;:.)]))?"
)

#: A command to type, which stays as it is, up to a comma or the end of the sentence.
_COMMAND = re.compile(r"((?:python -m )?mlx_sora [a-z]+(?:(?!, |\. |\.$).)*)")

#: Words after the path of a picture or video: frame or side, number of frames, strength.
_MORE = re.compile(r"(?: (?:before|after|first|last|-?\d+(?:\.\d+)?)\b)+")

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")

#: Values without digits of options that take more than the words of a list.
_VALUES = ("auto", "off", "all", "adaptive", "online", "reference", "shapes")

#: Words after a flag that is the subject of its sentence.
_VERBS = ("was", "is", "has", "must", "cannot", "needs", "changes")


def in_keywords(text: str, options: Mapping[str, Option]) -> str:
    """Return a message in the words of Python. options: all that there are, by keyword."""
    names = {flag.removeprefix("--"): name for name, o in options.items() for flag in o.flags}
    parts = _COMMAND.split(text)
    parts[::2] = [_reword(part, names, options) for part in parts[::2]]
    return "".join(parts)


def _reword(text: str, names: Mapping[str, str], options: Mapping[str, Option]) -> str:
    found: list[str] = []
    position = 0
    while match := _FLAG.search(text, position):
        flag, word = match["flag"], match["word"] or ""
        between = text[position : match.start()]
        found.append(", " if between == " " and found else between)
        position = match.end("flag")
        name = names.get(flag) or names.get(flag.removeprefix("no-"), "")
        option = options.get(name)
        if option is None:
            found.append(_OTHERS.get(flag, f"--{flag}"))
        elif isinstance(option.default, bool):
            found.append(name if word in _VERBS else f"{name}={flag in names}")
        elif _is_value(word, option):
            position = match.end()
            more = _MORE.match(text, position) if option.many else None
            words = [word, *(more[0].split() if more else ())]
            found.append(f"{name}={_spell(words)}")
            position = more.end() if more else position
        else:
            found.append(name)
    return "".join([*found, text[position:]])


def _is_value(word: str, option: Option) -> bool:
    """Return True for a word that is a value, False for one that goes on with the sentence."""
    if option.choices:
        return word in option.choices
    if word in _VALUES or _NUMBER.fullmatch(word) or _is_placeholder(word):
        return True
    takes_number = option.parse in (as_int, as_float)
    return not takes_number and re.search(r"[\d./:']", word) is not None


def _is_placeholder(word: str) -> bool:
    return word.isalpha() and word.isupper()


def _spell(words: list[str]) -> str:
    """Return a value as Python writes it."""
    spelt = [
        word if _is_placeholder(word) or _NUMBER.fullmatch(word) or word[0] == "'" else f'"{word}"'
        for word in words
    ]
    return spelt[0] if len(spelt) == 1 else f"[({', '.join(spelt)})]"
