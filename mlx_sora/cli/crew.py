"""A command on several ranks: the first reads, checks and speaks, the others follow in silence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from mlx_sora.cli.prompt_file import Batch
from mlx_sora.errors import UsageError
from mlx_sora.request import GenerationRequest
from mlx_sora.runtime.launcher import launched

if TYPE_CHECKING:
    from mlx_sora.runtime.ranks import Ranks


class Crew:
    """The processes of one command. One alone, as most are, has no use for MLX here."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        if launched() is not None:
            from mlx_sora.runtime.ranks import join

            self._ranks = join()

    @property
    def first(self) -> bool:
        """Whether this process speaks."""
        return self._ranks is None or self._ranks.first

    def together(self) -> AbstractContextManager[None]:
        """What fails in the block on one rank fails on all."""
        return nullcontext() if self._ranks is None else self._ranks.together()

    def watched(self) -> AbstractContextManager[None]:
        """What ends the block on one rank ends it on all."""
        return nullcontext() if self._ranks is None else self._ranks.watched()

    def batch(self, plan: Callable[[], Batch]) -> Batch:
        """The requests, as the first rank's files and flags have them."""
        if self._ranks is None:
            return plan()
        batch = Batch()
        with self.together():
            if self.first:
                batch = plan()
            if any(request.parallel == "off" for request in batch.requests):
                raise UsageError(
                    "--parallel off leaves nothing to the other ranks.",
                    "Start one process, without mlx.launch.",
                )
        requests = [request.to_dict() for request in batch.requests]
        told = self._ranks.of_first([requests, batch.lines, batch.unit])
        if not self.first:
            batch = Batch(list(map(GenerationRequest.from_dict, told[0])), told[1], unit=told[2])
        return batch

    def exit_code(self, code: int) -> int:
        """The first rank's exit code; waits until all are done."""
        return code if self._ranks is None else int(self._ranks.of_first(code))
