"""The locks of a run: one run per process, one per output, and its model stays on the disk.

MLX's limits of memory and cache, and the peaks that budgets are decided by, belong to the process.
So the second of two runs is refused. Runs may be made in any thread, one after the other. A forked
child has none of the threads that MLX began before the fork, and would wait for them for ever.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.runtime.events import Event, Finished
from mlx_sora.utils.files import name_hash, new_folders, recover
from mlx_sora.utils.leftovers import acquire_lock, exit_like, sign_lock, signals_as_exceptions

logger = logging.getLogger(__name__)

_process = threading.Lock()


#: Seconds that a daemon thread has at the end of the process to end after its run.
_GRACE = 1.0


class ExitGuard:
    """Stops the run of a daemon thread at the end of the process, in which MLX would abort it."""

    def __init__(self) -> None:
        self._thread, self._ending = threading.current_thread(), threading.Event()
        self._computing = threading.Lock()

    def stop(self) -> None:
        """Wait until the run no longer computes, and a moment for its thread to end."""
        self._ending.set()
        with self._computing:
            pass
        self._thread.join(_GRACE)

    def stop_at_exit(self, events: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """Yield the events; end the thread in silence once the process ends."""
        with self._computing, closing(events):
            for event in events:
                if not self._ending.is_set():
                    self._computing.release()
                    try:
                        yield event
                    finally:
                        self._computing.acquire()
                if self._ending.is_set():
                    raise SystemExit


@contextmanager
def process_lock(model: Path) -> Iterator[ExitGuard]:
    """Hold the process for one run of `model`; yield what stops the run when the process ends.

    Meanwhile SIGTERM and SIGHUP end the process with SystemExit, unless they have handlers: as on
    the command line, a checkpoint is written and partial files are removed. Raises UsageError if a
    run of any thread holds the process, and WeightsError while the model is being removed.
    """
    if not _process.acquire(blocking=False):
        raise UsageError(
            "Another run is in progress in this process.",
            "Wait until it ends, close its generator, or use another process.",
        )
    guard = ExitGuard()
    if threading.current_thread().daemon:  # Python waits for other threads
        atexit.register(guard.stop)
    try:
        with signals_as_exceptions(exit_like), model_lock(model):
            yield guard
    finally:
        atexit.unregister(guard.stop)
        _process.release()


@contextmanager
def model_lock(folder: Path) -> Iterator[None]:
    """Hold a model's folder for the block, with any number of others, against its removal.

    Raises WeightsError during a removal. File systems without locks are not protected.
    """
    handle = None
    try:
        try:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsError(
                f"{folder} is being removed.", "End that command, or choose another model."
            ) from None
        except OSError as error:  # also where the model is not downloaded
            logger.debug("cannot lock %s", folder, exc_info=error)
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def removal_lock(*folders: Path) -> Iterator[None]:
    """Hold `folders` alone for the block. Raises WeightsError if a run or download holds one."""
    with ExitStack() as stack:
        for folder in folders:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WeightsError(
                    f"{folder} is in use.", "Wait for that run, or end it."
                ) from None
        yield


def check_not_forked() -> None:
    """Raise UsageError in a process that was forked after its parent had called this."""
    if _first_process() != os.getpid():
        raise UsageError(
            "This process was forked from one that had used MLX, so MLX would hang in it.",
            'Start it with multiprocessing.get_context("spawn"), or fork before the first use.',
        )


@cache
def _first_process() -> int:
    return os.getpid()


@contextmanager
def output_lock(output: Path | None) -> Iterator[None]:
    """Hold `output` against other runs, of this process or others. Raises UsageError.

    The operating system frees the lock however the process ends. A killed run leaves a hidden file,
    which the next run in that folder removes, with what other killed runs have left there. File
    systems without locks are not protected.
    """
    if output is None:
        yield
        return
    path, handle, folders = lock_path(output), None, ExitStack()
    new_file = not path.exists()
    try:
        folders.enter_context(new_folders(path.parent))
        handle = acquire_lock(path)
        if handle is None:
            raise UsageError(
                f"Another run is making {output}.", "Wait for it, or give another --output."
            )
        sign_lock(handle)
    except OSError as error:
        logger.debug("cannot lock %s", path, exc_info=error)
        if new_file:
            with suppress(OSError):
                path.unlink()
    try:
        recover(path.parent)
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                path.unlink()
            os.close(handle)
        folders.close()


def is_locked(output: Path) -> bool:
    """Return whether a run is making `output` now."""
    try:
        handle = acquire_lock(lock_path(output), create=False)
    except OSError:
        return False
    if handle is not None:
        os.close(handle)
    return handle is None


@contextmanager
def output_lock_on_rank0(output: Path | None, ranks: Ranks) -> Iterator[None]:
    """Hold `output` on rank 0, which writes it; raise on all ranks if that is refused."""
    with ExitStack() as stack:
        with ranks.collective_errors():
            if ranks.is_rank0:
                stack.enter_context(output_lock(output))
        yield


def run_exclusively(
    model: Path, output: Path | None, events: Generator[Event, None, None], ranks: Ranks
) -> Generator[Event, None, None]:
    """Yield the events of a run while it holds the process, its model's folder and `output`.

    All locks are free again when the run yields `Finished`.
    """
    with (
        process_lock(model) as guard,
        output_lock_on_rank0(output, ranks),
        closing(guard.stop_at_exit(events)) as stoppable,
    ):
        for event in stoppable:
            if isinstance(event, Finished):
                break
            yield event
        else:
            return
    yield event


def lock_path(output: Path) -> Path:
    """Return the lock file of `output`: hidden, beside it, with a short name."""
    return output.with_name(f".{name_hash(output)}.lock")
