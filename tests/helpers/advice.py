"""Command lines that an advice names, as somebody types them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress

from mlx_sora.cli import main as cli
from mlx_sora.cli.flags import Parser
from tests.invariants.advice import FLAG


def matches(template: str, text: str) -> bool:
    """Return True if a text has the form of a template."""
    return re.search(".*".join(map(re.escape, template.split("{}"))), text) is not None


def ways(words: list[str], advice: str, values: str) -> Iterator[list[str]]:
    """Yield the command lines that an advice names: whole ones, or `words` with other flags."""
    advice, *commands = re.split(r"(?:python -m )?mlx_sora (?=[a-z])", advice)
    for command in commands:
        yield shlex.split(re.split(r"\. |\.$", command)[0])
    for part in re.split(r"; |, or |\. | or (?=another|change|--|make)|, (?=--)", advice):
        if changes := list(changed_flags(part, values)):
            yield apply(words, changes)


def changed_flags(part: str, values: str) -> Iterator[tuple[str, str | None]]:
    """Yield the flags of one way out with their values; None for a flag without."""
    known = flags()
    known = flags()
    for match in re.finditer(rf"({FLAG.pattern})(?: ([^\s,;()]+))?", part):
        flag, value = match[1], (match[2] or "").rstrip(".")
        action = known.get(flag)
        if action is None:  # of another program
            return
        if action.nargs == 0:
            yield flag, None
        else:
            named = bool(value) and not re.fullmatch("or|again|in|with", value)
            yield flag, value if named else values


def apply(words: list[str], changes: list[tuple[str, str | None]]) -> list[str]:
    """Return the command line with flags added or replaced."""
    result = list(words)
    for flag, value in changes:
        names = flags()[flag].option_strings
        for name in names:
            if name in result and value is not None:
                at = result.index(name)
                del result[at : at + 2]
        result += [flag] if value is None else [flag, value]
    return result


def flags() -> dict[str, argparse.Action]:
    """Return the flags of all commands; those of generate come first."""
    found: dict[str, argparse.Action] = {}
    for parser in reversed(parsers()):
        found |= parser._option_string_actions
    return found


def parsers() -> list[Parser]:
    """Return the parsers of the commands."""
    top = cli.build_parser()
    assert isinstance(top, Parser)
    below = [each for parser in top._commands().values() for each in parser._commands().values()]
    return [*top._commands().values(), *below, top]


def parse(words: list[str]) -> None:
    """Parse a command line."""
    with suppress(SystemExit):  # after --help; other ends are errors of ours
        cli.build_parser().parse_args(words)
