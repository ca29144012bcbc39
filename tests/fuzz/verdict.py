"""What an execution may do: succeed, or say in one bounded, printable line what is wrong."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mlx_sora.errors import MlxSoraError
from tests.helpers.heap import heap_in_use

#: More of any of these is a finding, whatever the input: characters of an error, seconds of
#: processor time, bytes by which the process grew (a picture of 40 million pixels takes most).
MAX_LINE, MAX_SECONDS, MAX_GROWTH = 2500, 8.0, 600_000_000

#: Most bytes that an execution may leave on the heap, as a mean: an object or two would be more.
MAX_LEAK = 50.0

#: Bytes by which the heap of an interpreter varies from round to round.
NOISE = 16_000


@dataclass(frozen=True)
class Verdict:
    """A finding. kind: one word to tell findings apart by; detail: what happened."""

    kind: str
    detail: str


def judge(
    run: Callable[[bytes, Path], None], data: bytes, folder: Path, limit: float = MAX_SECONDS
) -> Verdict | None:
    """Run a target on `data`; None where all is well. limit: seconds of processor time."""
    before, started = _peak(), time.process_time()
    found = None
    try:
        run(data, folder)
    except MlxSoraError as error:
        found = _line(str(error))
    except Exception as error:
        found = Verdict(_place(error), f"{type(error).__name__}: {str(error)[:200]}")
    seconds, growth = time.process_time() - started, _peak() - before
    if found is None and seconds > limit:
        found = Verdict("slow", f"{seconds:.1f} s")
    if found is None and growth > MAX_GROWTH:
        found = Verdict("memory", f"{growth / 1e6:.0f} MB")
    return found


def leak(
    run: Callable[[bytes, Path], None], inputs: Sequence[bytes], folder: Path, passes: int = 1
) -> float:
    """Return the bytes that an execution leaves on the heap, as a mean over all inputs.

    A first pass, which fills caches, does not count; of three rounds of `passes` passes the least
    counts, as what is made once may be made late.
    """
    sizes = []
    for count in (1, passes, passes, passes):
        for data in [*inputs] * count:
            judge(run, data, folder)
        sizes.append(heap_in_use())
    growth = min(after - before for before, after in pairwise(sizes))
    return max(0, growth - NOISE) / (passes * len(inputs))


def _line(text: str) -> Verdict | None:
    if not text.isprintable():
        return Verdict("unprintable", repr(text[:200]))
    if len(text) > MAX_LINE:
        return Verdict("endless", f"{len(text)} characters: {text[:100]}")
    return None


def _place(error: Exception) -> str:
    """Type of an exception, and the last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "mlx_sora/" in frame.filename]
    where = f"{Path(ours[-1].filename).stem}-{ours[-1].name}" if ours else "outside"
    return f"{type(error).__name__}-{where}"


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
