"""Make a video in a thread or a forked process, WAY of `run_in_thread.py WAY`; exit with 0."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.runtime.events import Finished, StepFinished

step_made = threading.Event()


def make(steps: int = 1, **options: object) -> None:
    request = GenerationRequest.from_dict(
        {"prompt": "a red circle", "num_frames": 1, "seed": 1, "steps": steps, **options}
    )
    for event in Pipeline.from_pretrained("shapes").stream(request):
        if isinstance(event, StepFinished):
            step_made.set()
    assert isinstance(event, Finished)


def make_and_wait() -> None:
    """Begin a video, and wait at its first step for ever, as for a client that has gone."""
    request = GenerationRequest(prompt="a red circle", num_frames=1, seed=1, steps=2)
    for event in Pipeline.from_pretrained("shapes").stream(request):
        if isinstance(event, StepFinished):
            step_made.set()
            threading.Event().wait()


def make_forked() -> int:
    """Make a video in a forked process; return its exit code: 0 made, 3 refused, -9 killed."""

    def child() -> None:
        try:
            make()
        except UsageError as error:
            sys.stdout.write(f"{error}\n")
            sys.stdout.flush()
            sys.exit(3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


if __name__ == "__main__":
    if sys.argv[1] == "thread":
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    elif sys.argv[1] == "streamed":
        thread = threading.Thread(target=make, kwargs={"ci_dl": True})
        thread.start()
        thread.join()
    elif sys.argv[1] == "pool":
        pool = ThreadPoolExecutor(2)
        pool.submit(make).result()
        pool.submit(make).result()
    elif sys.argv[1] == "unfinished daemon":
        threading.Thread(target=make, args=(1000,), daemon=True).start()
        step_made.wait()
    elif sys.argv[1] == "waiting daemon":
        threading.Thread(target=make_and_wait, daemon=True).start()
        step_made.wait()
    elif sys.argv[1] == "forked before":
        assert make_forked() == 0
    elif sys.argv[1] == "forked after":
        make()
        assert make_forked() == 3
    else:
        raise SystemExit(f"no such way: {sys.argv[1]}")
