"""Watchdog: end this rank when another fails, and report our own failure.

An error on one rank would leave the others in a collective that never returns, or that breaks
without a reason. With the watchdog all ranks end with the same cause and exit code, and one of
them names the lost rank at once: mlx.launch ends all others as soon as one has ended.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from mlx_sora.distributed.failure import Failure
from mlx_sora.distributed.heartbeat import AllGatherBytes, Heartbeat
from mlx_sora.distributed.launch import launch_addresses, launch_rank
from mlx_sora.errors import MlxSoraError, RankLostError

#: Seconds to wait for the reason of a broken collective, and for the main thread to notice a
#: failure before the process is ended.
GRACE = 3.0

#: Seconds that a rank with an error waits for rank 0, which reports it.
_FAREWELL = 15.0


class Watchdog:
    """Watchdog over the other ranks until the process ends.

    coordinator: "host:port" of rank 0, where MLX's backend will listen; empty if unknown.
    """

    def __init__(self, rank: int, size: int, coordinator: str) -> None:
        self._scopes, self._connected = 0, False
        self._error_raised, self._reported = threading.Event(), threading.Event()
        self._heartbeat = Heartbeat(rank, size, coordinator, self._end_process)
        atexit.register(self._heartbeat.close)

    def meet(self) -> None:
        """Wait until all ranks are there. Raises RankLostError if one has failed."""
        self._heartbeat.meet()
        self._check()

    def connect(self, all_gather: AllGatherBytes) -> None:
        """Connect the ranks that have not met. all_gather: a collective of all."""
        self._heartbeat.connect(all_gather)
        self._connected = True
        self._check()

    def begin_collective(self) -> None:
        """Count a collective. Raises RankLostError if another rank has failed."""
        self._check()
        self._heartbeat.begin_collective()

    def tick(self) -> None:
        """Count a sign of other work."""
        self._heartbeat.tick()

    def allow_silence(self, idle: float, busy: float) -> None:
        """Let this rank seem idle, or compute without a sign, for so many seconds from now on."""
        self._heartbeat.allow_silence(idle, busy)

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
                error.on_rank = self._heartbeat.name
                self._heartbeat.fail(f"ended with an error: {error.flag_text}", error.exit_code)
            raise
        except Exception as error:
            failure = self._heartbeat.wait(GRACE)
            if failure is None:
                text = " ".join(str(error).split())[:300]
                self._heartbeat.fail(f"ended with an error: {type(error).__name__}: {text}")
                error.on_rank = self._heartbeat.name  # type: ignore[attr-defined]
                raise
            raise self._rank_lost(failure) from error
        except BaseException as error:
            failure = self._heartbeat.interrupt()
            if failure is None:
                raise
            raise self._rank_lost(failure) from error
        finally:
            self._scopes -= 1

    def leave(self, error: MlxSoraError) -> bool:
        """Wait until rank 0 has reported an error of this rank. Return False if it is not there.

        Launchers end all ranks when one has ended. An error from before the ranks have met is told
        to rank 0; it does not come if it has the same.
        """
        if not self._connected:
            if not self._heartbeat.wait_for_rank0(_FAREWELL):
                return False
            self._heartbeat.fail(f"ended with an error: {error.flag_text}", error.exit_code)
        self._heartbeat.wait_for_end(_FAREWELL)
        return True

    def _check(self) -> None:
        if self._heartbeat.failure is not None:
            raise self._rank_lost(self._heartbeat.failure)

    def _rank_lost(self, failure: Failure) -> RankLostError:
        self._error_raised.set()
        self._reported.wait(GRACE)
        return _rank_lost_error(failure, failure.reporter == self._heartbeat.rank)

    def _end_process(self, failure: Failure) -> None:
        """Name the lost rank; end the process unless its main thread does or is in no scope."""
        if failure.reporter == self._heartbeat.rank:
            line = f"\nerror: {_rank_lost_error(failure, True)}\n"
            os.write(2, line.encode(errors="replace"))
        self._reported.set()
        self._heartbeat.say_farewell()
        if self._error_raised.wait(GRACE) or not self._scopes:
            return
        os._exit(failure.exit_code)


@cache
def launched_watchdog() -> Watchdog | None:
    """Return the watchdog of a process that a launcher has started as one of several ranks."""
    addresses = launch_addresses()
    if len(addresses) < 2:
        return None
    return Watchdog(launch_rank(), len(addresses), addresses[0])


def _rank_lost_error(failure: Failure, reported: bool) -> RankLostError:
    fix = ""
    if failure.exit_code == 1:  # others have a fix of their own
        fix = "Start all ranks again; with --checkpoint-every they go on from the last checkpoint."
    return RankLostError(str(failure), fix, failure.rank, failure.exit_code, reported=reported)
