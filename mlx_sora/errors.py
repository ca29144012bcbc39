"""Errors with a cause and a fix: one line for each.

Each class has the exit code of the command line (1 run, 2 usage, 3 memory, 4 weights).
"""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote

#: Exit code of an interrupted program.
INTERRUPTED = 130

#: Largest length of a message, which may quote text of any length.
MAX_MESSAGE = 1000

#: Longest quoted word in a command to type: `printable` would cut a longer one inside its quotes.
MAX_WORD = 300

#: Stands for a word that cannot be typed.
NO_WORD = "..."


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return `text` as one printable line, shortened in the middle to `limit` characters.

    Line breaks, escape sequences, direction marks and surrogates become \\n, \\x1b, ...
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[len(text) - limit // 4 :]}"
    if text.isprintable():
        return text
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= limit else plain[:limit] + " ..."


def shell_words(*words: object) -> str:
    """Return `words` as text to type, which a shell splits into exactly these words.

    A word that is too long or not printable becomes NO_WORD. All words of a command in an error
    that come from elsewhere, such as paths, go through here.
    """
    quoted = (quote(str(word)) for word in words)
    return " ".join(w if w.isprintable() and len(w) <= MAX_WORD else NO_WORD for w in quoted)


class MlxSoraError(Exception):
    """A failure with a known cause. `fix` tells the user in one sentence what to do.

    Both are written with flags; the Python API puts keywords in their place. Both become one
    printable line, because they quote text from elsewhere.
    """

    exit_code = 1

    #: All ranks have raised it.
    on_all_ranks = False

    #: Rank and host that alone has raised it, of several that work together.
    on_rank = ""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = printable(message)
        self.fix = printable(fix)

        #: Message and fix with flags, as the command line prints them.
        self.in_flags = (self.message, self.fix)

    def __str__(self) -> str:
        return f"{self.message} {self.fix}".strip()

    @property
    def flag_text(self) -> str:
        """Message and fix in one line, with flags."""
        return " ".join(self.in_flags).strip()

    def reword(self, words: Callable[[str], str]) -> None:
        """Put message and fix into other words, such as those of Python; `in_flags` stays."""
        self.message, self.fix = (words(text) for text in self.in_flags)


class UsageError(MlxSoraError):
    """A request with an unknown value, an impossible size or an unwritable output."""

    exit_code = 2


class MemoryBudgetError(MlxSoraError):
    """The work does not fit the memory budget."""

    exit_code = 3


class WeightsError(MlxSoraError):
    """Missing, damaged or unsuitable weights. Names file, key, expected and found."""

    exit_code = 4


class NumericsError(MlxSoraError):
    """NaN, Inf or degenerate values, with the stage and step."""


class RankLostError(MlxSoraError):
    """Another rank, `rank`, has ended the run for all. reported: this rank has printed it."""

    def __init__(
        self, message: str, fix: str, rank: int, exit_code: int = 1, *, reported: bool = False
    ) -> None:
        super().__init__(message, fix)
        self.rank, self.exit_code, self.reported = rank, exit_code, reported
