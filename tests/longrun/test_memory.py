"""Many runs in one process: memory does not grow, and nothing is left of threads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.longrun.table import Fault

RUNS = 50

#: Makes RUNS videos and prints the resident set after each, in bytes, then the threads alive.
MAKE = """
import json, sys, threading
from mlx_sora import Pipeline
from mlx_sora.memory.limits import process_memory
pipe = Pipeline.from_pretrained("shapes")
sizes = []
for number in range(int(sys.argv[1])):
    pipe("a red circle moving right", seed=number, steps=2, ci_dl=sys.argv[2] == "streamed")
    sizes.append(process_memory())
print(json.dumps([sizes, threading.active_count()]))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="the system tells no current size")
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_fifty_videos_take_the_memory_of_one(fault: Fault, way: str) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", MAKE, str(RUNS), way], capture_output=True, text=True, check=True
    )
    sizes, threads = json.loads(outcome.stdout)
    assert len(sizes) == RUNS
    # The first runs compile kernels and fill allocators.
    early, late = max(sizes[2:10]), max(sizes[-10:])
    growth = late / early - 1
    assert abs(growth) <= 0.05
    assert threads == 1
    fault(
        "many runs in one process",
        f"all, {way}",
        RUNS,
        0,
        f"resident set {early / 1e6:.0f} MB early, {late / 1e6:.0f} MB late ({growth:+.1%})",
    )


#: Two threads by turns make videos; each is compared with the first of its seed.
THREADS = """
import threading
import numpy as np
from mlx_sora import Pipeline, UsageError
pipe, seen, refused, wrong = Pipeline.from_pretrained("shapes"), {}, [0], [0]
def work(seeds):
    for seed in seeds:
        while True:
            try:
                frames = pipe("a red circle", seed=seed, steps=1, num_frames=1).frames
                break
            except UsageError:
                refused[0] += 1
                threading.Event().wait(0.05)
        wrong[0] += not np.array_equal(seen.setdefault(seed, frames), frames)
threads = [threading.Thread(target=work, args=([1, 2],)) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(seen), refused[0] > 0, wrong[0])
"""


def test_two_threads(fault: Fault) -> None:
    """The second is refused while the first works; results are equal, exits clean without help."""
    processes = 5
    for _ in range(processes):
        outcome = subprocess.run(
            [sys.executable, "-c", THREADS], capture_output=True, text=True, check=False
        )
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout == "2 True 0\n"
    fault("two threads, one process", "all", 4 * processes, 0, "refused in turn, equal, clean exit")


#: Prepares a batch of N prompts; prints the resident set at its first event and processor seconds.
BATCH = """
import sys, time
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.memory.limits import process_memory
pipe = Pipeline.from_pretrained("shapes")
requests = [GenerationRequest(f"circle {i}", seed=i, steps=1) for i in range(int(sys.argv[1]))]
events = pipe.stream_all(requests)
start = time.process_time()
next(events)
print(process_memory(), time.process_time() - start)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="the system tells no current size")
def test_a_thousand_prompts_take_little_more_memory_than_one(fault: Fault) -> None:
    (one, first), (many, last) = (
        map(float, subprocess.check_output([sys.executable, "-c", BATCH, str(n)]).split())
        for n in (1, 1000)
    )
    assert many - one < 40_000_000
    seen = f"{(many - one) / 1e6:.1f} MB and {last - first:.1f} s of a core more than one"
    fault("batch of 1000 prompts", "first event", 1, 0, seen)


#: Runs of all kinds; a round of `tests/helpers/mixed_runs.py` makes 19 of them.
MIXED_RUNS = 300


@pytest.mark.skipif(sys.platform != "linux", reason="mallinfo2 is glibc's")
def test_mixed_runs_leave_the_heap_as_it_is(fault: Fault) -> None:
    words = [sys.executable, "-m", "tests.helpers.mixed_runs"]
    outcome = subprocess.check_output([*words, str(-(-MIXED_RUNS // 19) + 1)], text=True)
    rows = [json.loads(line) for line in outcome.splitlines()]
    runs, used, objects, drawn = zip(*rows[1:], strict=True)  # the first compiles kernels
    assert sum(runs) >= MIXED_RUNS
    assert len(set(drawn)) == 1  # the caller's random numbers
    growth = used[-1] / used[0] - 1
    assert abs(growth) < 0.02
    assert abs(objects[-1] / objects[0] - 1) < 0.02
    fault(
        "many runs in one process",
        "all kinds: heap in use",
        sum(runs),
        0,
        f"{used[0] / 1e6:.2f} MB early, {used[-1] / 1e6:.2f} MB late ({growth:+.2%})",
    )
