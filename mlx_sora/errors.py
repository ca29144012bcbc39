"""Errors a user can act on: one line that says what happened, one that says what to do.

Each class carries the exit code of the command line (1 run, 2 usage, 3 memory, 4 weights).
"""

from __future__ import annotations

#: Exit code of a program that was interrupted.
INTERRUPTED = 130

#: Characters of a message: what it quotes may be of any length.
MAX_MESSAGE = 1000


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` as one line that a terminal shows and does not obey, cut in the middle to `limit`.

    Line breaks, escape sequences, marks of direction and half characters come as \\n, \\x1b, ...
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[len(text) - limit // 4 :]}"
    if text.isprintable():
        return text
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= limit else plain[:limit] + " ..."


class MlxSoraError(Exception):
    """A failure with a known cause. `fix` says in one sentence what the user can do about it.

    Both are brought into one printable line: they quote what others wrote.
    """

    exit_code = 1

    #: Of several ranks, all have raised it.
    on_all_ranks = False

    #: The rank that reports it: the first of those that are left.
    reporting_rank = 0

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = printable(message)
        self.fix = printable(fix)

    def __str__(self) -> str:
        return f"{self.message} {self.fix}".strip() if self.fix else self.message


class UsageError(MlxSoraError):
    """A request that cannot be meant: unknown value, impossible size, unwritable output."""

    exit_code = 2


class MemoryBudgetError(MlxSoraError):
    """The work does not fit the memory that it may use."""

    exit_code = 3


class WeightsError(MlxSoraError):
    """Weights that are missing, damaged or of another model. Names file, key, expected, found."""

    exit_code = 4


class NumericsError(MlxSoraError):
    """NaN, Inf or degenerate values, with the stage and step where they appeared."""


class RankLostError(MlxSoraError):
    """Of several processes that make a video together, rank `rank` has ended it for all."""

    def __init__(self, message: str, fix: str, rank: int, exit_code: int = 1) -> None:
        super().__init__(message, fix)
        self.rank, self.exit_code = rank, exit_code
        self.reporting_rank = 1 if rank == 0 else 0
