"""A command on several ranks: the first reads, checks and speaks, the others follow in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlx_sora.distributed.launch import launched
from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    from mlx_sora.distributed.group import Ranks


class Broadcastable(Protocol):
    """What a command is to make, which a rank can tell the others."""

    @property
    def single_process(self) -> bool:
        """Whether one rank is to make it by itself."""

    def to_dict(self) -> dict[str, Any]:
        """All that the others need, as plain JSON values."""

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """The same, of such values."""


T = TypeVar("T", bound=Broadcastable)


class CommandGroup:
    """The processes of one command. One alone, as most are, has no use for MLX here."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        if launched() is not None:
            from mlx_sora.distributed.group import init_ranks

            self._ranks = init_ranks()

    @property
    def first(self) -> bool:
        """Whether this process speaks."""
        return self._ranks is None or self._ranks.is_rank0

    def together(self) -> AbstractContextManager[None]:
        """What fails in the block on one rank fails on all."""
        return nullcontext() if self._ranks is None else self._ranks.collective_errors()

    def watched(self) -> AbstractContextManager[None]:
        """What ends the block on one rank ends it on all."""
        return nullcontext() if self._ranks is None else self._ranks.watchdog_scope()

    def broadcast_request(self, kind: type[T], plan: Callable[[], T]) -> T:
        """What to make, as the first rank's files, flags and standard input have it."""
        if self._ranks is None:
            return plan()
        made: T | None = None
        with self.together():
            if self.first:
                made = plan()
                if made.single_process:
                    raise UsageError(
                        "--parallel off leaves nothing to the other ranks.",
                        "Start one process, without mlx.launch.",
                    )
        told = self._ranks.broadcast_object(None if made is None else made.to_dict())
        return kind.from_dict(told) if made is None else made

    def exit_code(self, code: int) -> int:
        """The first rank's exit code; waits until all are done."""
        return code if self._ranks is None else int(self._ranks.broadcast_object(code))
