"""Watchdog: end this rank when another fails, and report our own failure.

An error on one rank would leave the others in a collective that never returns, or that breaks
without a reason. With the watchdog all ranks end with the same line and exit code.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_sora.distributed.heartbeat import AllGatherBytes, Failure, Heartbeat
from mlx_sora.errors import INTERRUPTED, MlxSoraError, RankLostError

#: Seconds to wait for the reason of a broken collective, and for the main thread to notice a
#: failure before the process is ended.
GRACE = 3.0


class Watchdog:
    """Watchdog over the other ranks until the process ends. all_gather: a collective of all."""

    def __init__(self, rank: int, size: int, all_gather: AllGatherBytes) -> None:
        self._scopes, self._error_raised = 0, threading.Event()
        self._heartbeat = Heartbeat(rank, size, all_gather, self._end_process)
        atexit.register(self._heartbeat.close)

    def begin_collective(self) -> None:
        """Count a collective. Raises RankLostError if another rank has failed."""
        if self._heartbeat.failure is not None:
            raise self._rank_lost(self._heartbeat.failure)
        self._heartbeat.begin_collective()

    def tick(self) -> None:
        """Count a sign of other work."""
        self._heartbeat.tick()

    def allow_idle(self, seconds: float) -> None:
        """Let this rank seem idle for so long from now on."""
        self._heartbeat.allow_idle(seconds)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Run the block as `Ranks.watchdog_scope` does."""
        self._scopes += 1
        try:
            yield
        except (RankLostError, GeneratorExit):
            # A caller may stop reading events and go on with these ranks. If only one rank does
            # that, it is found to hang.
            raise
        except MlxSoraError as error:
            if not error.on_all_ranks:
                self._heartbeat.fail(f"stopped: {error.message}", error.exit_code)
            raise
        except Exception as error:
            failure = self._heartbeat.wait(GRACE)
            if failure is None:
                self._heartbeat.fail(f"stopped: {' '.join(str(error).split())[:300]}")
                raise
            raise self._rank_lost(failure) from error
        except BaseException:
            self._heartbeat.fail("was interrupted.", INTERRUPTED)
            raise
        finally:
            self._scopes -= 1

    def _rank_lost(self, failure: Failure) -> RankLostError:
        self._error_raised.set()
        return _rank_lost_error(failure)

    def _end_process(self, failure: Failure) -> None:
        """End the process, unless its main thread ends by itself or is outside all scopes."""
        if self._error_raised.wait(GRACE) or not self._scopes:
            return
        error = _rank_lost_error(failure)
        if self._heartbeat.rank == error.reporting_rank:
            os.write(2, f"\nerror: {error}\n".encode())
        os._exit(failure.exit_code)


def _rank_lost_error(failure: Failure) -> RankLostError:
    fix = "Start all ranks again; with --checkpoint-every they go on from the last checkpoint."
    if failure.exit_code == INTERRUPTED:
        fix = ""
    return RankLostError(str(failure), fix, rank=failure.rank, exit_code=failure.exit_code)
