"""Interrupts of a run: its checkpoint, and the command that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_sora.distributed.launch import launch_backend
from mlx_sora.errors import shell_words
from mlx_sora.video.output_path import checkpoint_path, output_path

if TYPE_CHECKING:
    from mlx_sora.request.generation import GenerationRequest


@contextmanager
def explain_interrupt(explain: Callable[[], str]) -> Iterator[None]:
    """Add `explain()` to an interrupt of the block."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(explain()) from None


def interrupted_run(
    requests: Sequence[GenerationRequest], finished: int, resume: str | None, *, repeat: bool
) -> str:
    """Return what is left of an interrupted run, and how to go on.

    finished: requests that were carried out, or failed. resume: checkpoint that the run came from.
    repeat: the same command leaves out what is there.
    """
    request = requests[min(finished, len(requests) - 1)]
    done, nothing = "", "Nothing was written."
    if len(requests) > 1:
        done = f"{finished} of {len(requests)} videos are done. "
        nothing = "Of the next one, nothing was written."
    again = " The same command goes on from there." if repeat or launch_backend() else ""
    found = find_checkpoint(request, resume)
    if found is not None:
        command = f" Go on: python -m mlx_sora generate --resume {shell_words(found)}"
        return f"{done}{found} has the steps so far.{again or command}"
    if request.checkpoint_every is None and resume is None:
        return f"{done}{nothing} To be able to go on next time, add --checkpoint-every 5"
    return f"{done}No step was finished. {nothing}{again}"


def find_checkpoint(request: GenerationRequest, resume: str | None) -> Path | None:
    """Return the checkpoint beside the output of a request, or `resume`, if it exists."""
    paths = [] if resume is None else [Path(resume)]
    if request.checkpoint_every is not None or resume is not None:
        # The output is filled in, but for the suffix, which may depend on the number of frames.
        make = partial(output_path, str(request.output), prompt="", seed=0)
        paths = [*(checkpoint_path(make(num_frames=frames)) for frames in (1, 2)), *paths]
    return next((path for path in paths if path.is_file()), None)
