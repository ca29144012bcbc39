"""One run per output: whoever comes second is told so before it has worked for hours."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import UsageError
from mlx_sora.runtime.events import Event, Finished

if TYPE_CHECKING:
    from filelock import FileLock

import threading

logger = logging.getLogger(__name__)


@contextmanager
def output_lock(output: Path | None) -> Iterator[None]:
    """Hold `output` against other runs, of this process or others. Raises UsageError.

    The system lets go when a process ends in whatever way, so no claim outlives its run; what a
    killed run leaves is an empty hidden file that the next one takes over. Where the file system
    has no locks, nothing is held.
    """
    if output is None:
        yield
        return
    from filelock import Timeout

    place, lock = lock_path(output), _lock(output)
    made = not place.parent.exists()  # of a sequence; its writer would make it later
    new, held = not place.exists(), False
    try:
        place.parent.mkdir(exist_ok=True)
        lock.acquire()
        held = True
    except Timeout:
        raise UsageError(
            f"Another run is making {output}.", "Wait for it, or give another --output."
        ) from None
    except OSError as error:
        logger.debug("cannot lock %s", place, exc_info=error)
        if new:
            with suppress(OSError):
                place.unlink()
    try:
        yield
    finally:
        if held:
            with suppress(OSError):
                place.unlink()
            lock.release()
        if made:
            with suppress(OSError):
                place.parent.rmdir()


def is_locked(output: Path) -> bool:
    """Whether a run is making `output` now."""
    from filelock import Timeout

    if not lock_path(output).exists():
        return False
    try:
        with _lock(output):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@contextmanager
def output_lock_on_rank0(output: Path | None, ranks: Ranks) -> Iterator[None]:
    """`claimed` by the rank that writes; what refuses it ends all of them."""
    with ExitStack() as held:
        with ranks.collective_errors():
            if ranks.is_rank0:
                held.enter_context(output_lock(output))
        yield


def run_exclusively(
    output: Path | None, events: Generator[Event, None, None], ranks: Ranks
) -> Generator[Event, None, None]:
    """The events of a run that has the process and `output` for itself, from its first event on.

    It holds neither any more when it says that it has finished.
    """
    with process_lock(), output_lock_on_rank0(output, ranks), closing(events):
        for event in events:
            if isinstance(event, Finished):
                break
            yield event
        else:
            return
    yield event


def _lock(output: Path) -> FileLock:
    """The claim to `output`, not yet held: acquiring it never waits; any thread may release it."""
    from filelock import FileLock

    return FileLock(lock_path(output), timeout=0, thread_local=False, is_singleton=False)


def lock_path(output: Path) -> Path:
    """The file that stands for `output`, hidden beside it; short, whatever the name."""
    name = hashlib.sha256(output.name.encode()).hexdigest()[:12]
    return output.with_name(f".{name}.lock")


_turn = threading.Lock()


@contextmanager
def process_lock() -> Iterator[None]:
    """Hold the process's turn. Raises UsageError where another run, of any thread, has it."""
    if not _turn.acquire(blocking=False):
        raise UsageError(
            "Another run of this process is under way.",
            "Wait for its end, close its generator, or start a process for this one.",
        )
    try:
        yield
    finally:
        _turn.release()
