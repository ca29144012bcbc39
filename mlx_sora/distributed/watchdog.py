"""What a rank does about the others' end, and lets them know of its own.

An error that only one rank meets leaves the others in a collective that never returns, or that ends
with a lost connection and no reason. Here all of them end with the same line and exit code.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_sora.distributed.heartbeat import Failure, Heartbeat, Share
from mlx_sora.errors import INTERRUPTED, MlxSoraError, RankLostError

#: Seconds that a broken collective waits for its reason, and that the main thread has to take
#: notice of another's end before the process is ended.
GRACE = 3.0


class Watchdog:
    """Over the other ranks of a run, until the process ends. share: a collective of all ranks."""

    def __init__(self, rank: int, size: int, share: Share) -> None:
        self._inside, self._noticed = 0, threading.Event()
        self._peers = Heartbeat(rank, size, share, self._give_up)
        atexit.register(self._peers.close)

    def progress(self) -> None:
        """Another exchange begins. Raises RankLostError where there is nobody left for it."""
        if self._peers.failure is not None:
            raise self._lost(self._peers.failure)
        self._peers.progress()

    def tick(self) -> None:
        """This rank is at work of its own."""
        self._peers.tick()

    @contextmanager
    def block(self) -> Iterator[None]:
        """As `Ranks.watched`."""
        self._inside += 1
        try:
            yield
        except (RankLostError, GeneratorExit):
            # Who stops listening to a run, mostly at its end, may do more with these ranks; one
            # that does so alone will be found to hang.
            raise
        except MlxSoraError as error:
            if not error.on_all_ranks:
                self._peers.fail(f"stopped: {error.message}", error.exit_code)
            raise
        except Exception as error:
            failure = self._peers.wait(GRACE)
            if failure is None:
                self._peers.fail(f"stopped: {' '.join(str(error).split())[:300]}")
                raise
            raise self._lost(failure) from error
        except BaseException:
            self._peers.fail("was interrupted.", INTERRUPTED)
            raise
        finally:
            self._inside -= 1

    def _lost(self, failure: Failure) -> RankLostError:
        self._noticed.set()
        return _error(failure)

    def _give_up(self, failure: Failure) -> None:
        """End the process, unless its main thread ends by itself or has no part in this."""
        if self._noticed.wait(GRACE) or not self._inside:
            return
        error = _error(failure)
        if self._peers.rank == error.reporting_rank:
            os.write(2, f"\nerror: {error}\n".encode())
        os._exit(failure.exit_code)


def _error(failure: Failure) -> RankLostError:
    fix = "Start all ranks again; with --checkpoint-every they go on from the last checkpoint."
    if failure.exit_code == INTERRUPTED:
        fix = ""
    return RankLostError(str(failure), fix, rank=failure.rank, exit_code=failure.exit_code)
