"""Two runs in one process, and listeners that fail: refused by name, ended cleanly, never mixed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.errors import MlxSoraError
from mlx_sora.pipeline.locks import is_locked, output_lock
from mlx_sora.runtime.events import (
    Event,
    Finished,
    RequestFailed,
    StageProgress,
    StageStarted,
    StepFinished,
)
from mlx_sora.utils.files import partial_name

PROMPT = "a red circle moving right on a black background"


def asked(**options: object) -> GenerationRequest:
    values = {"prompt": PROMPT, "steps": 1, "num_frames": 1, "seed": 1}
    return GenerationRequest.from_dict({**values, **options})


def made(events: Iterator[Event]) -> np.ndarray:
    *_, last = events
    assert isinstance(last, Finished)
    assert last.video.frames is not None
    return last.video.frames


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> np.ndarray:
    return made(pipe.stream(asked()))


def test_the_second_run_is_refused_and_does_not_disturb_the_first(
    pipe: Pipeline, expected: np.ndarray
) -> None:
    first = pipe.stream(asked())
    next(first)
    other = Pipeline.from_pretrained("shapes")
    errors: list[Exception] = []

    def second() -> None:
        try:
            next(other.stream(asked(seed=2)))
        except MlxSoraError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert [str(error).partition(".")[0] for error in errors] == [
        "Another run is in progress in this process"
    ]
    with pytest.raises(UsageError, match="Another run"):
        next(other.stream_all([asked(seed=2)]))
    assert np.array_equal(made(first), expected)
    assert np.array_equal(made(other.stream(asked())), expected)


def test_a_run_that_has_finished_holds_nothing(pipe: Pipeline, expected: np.ndarray) -> None:
    """Its generator may still wait at the last event."""
    for event in pipe.stream(asked()):
        if isinstance(event, Finished):
            assert np.array_equal(made(pipe.stream(asked())), expected)


def test_a_run_that_never_began_holds_nothing(pipe: Pipeline, expected: np.ndarray) -> None:
    waiting = pipe.stream(asked())
    assert np.array_equal(made(pipe.stream(asked())), expected)
    waiting.close()


def test_one_after_the_other_in_threads_is_the_same(pipe: Pipeline, expected: np.ndarray) -> None:
    """Also for a run that was prepared in another thread than the one that makes it."""
    for options in ({}, {"ci_dl": True}):
        events, found = pipe.stream(asked(**options)), list[np.ndarray]()
        thread = threading.Thread(target=lambda e=events, f=found: f.append(made(e)))
        thread.start()
        thread.join()
        assert np.array_equal(found[0], expected)


def test_in_a_batch_each_output_is_held_in_turn(pipe: Pipeline, tmp_path: Path) -> None:
    requests = [asked(output=str(tmp_path / f"{n}.png")) for n in range(2)]
    events = pipe.stream_all(requests)
    for event in events:
        if isinstance(event, StageStarted) and event.stage == "denoise":
            break
    hold = "import sys; from pathlib import Path; from mlx_sora.pipeline.locks import output_lock\n"
    hold += "for name in sys.argv[1:]:\n    with output_lock(Path(name)): print('free')"
    outcome = subprocess.run(
        [sys.executable, "-c", hold, *(str(request.output) for request in reversed(requests))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.stdout == "free\n"
    assert "Another run is making" in outcome.stderr
    rest = list(events)
    assert not [event for event in rest if isinstance(event, RequestFailed)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("name", "same"),
    [("up.mp4", True), ("UP.mp4", True), ("u\u0308p.mp4", False), ("\u00fcp.mp4", False)],
)
def test_names_that_differ_in_case_only_share_a_lock(tmp_path: Path, name: str, same: bool) -> None:
    with output_lock(tmp_path / "Up.mp4"):
        assert is_locked(tmp_path / name) is same
    assert (partial_prefix(tmp_path / name) == partial_prefix(tmp_path / "Up.mp4")) is same


def test_names_that_differ_in_the_form_of_accents_share_a_lock(tmp_path: Path) -> None:
    with output_lock(tmp_path / "\u00dcber.mp4"):
        assert is_locked(tmp_path / "u\u0308ber.mp4")


def partial_prefix(path: Path) -> str:
    return partial_name(path).name.partition("-")[0]


class Mine(Exception):
    """What a listener raises."""


def limits() -> tuple[int, int]:
    """MLX's limits of cache and memory."""
    cache, memory = mx.set_cache_limit(1 << 30), mx.set_memory_limit(1 << 40)
    mx.set_cache_limit(cache)
    mx.set_memory_limit(memory)
    return cache, memory


def stopped(pipe: Pipeline, request: GenerationRequest, count: int, way: str) -> list[Event]:
    """The first `count` events of a run that its listener then ends by an error, or by closing.

    Nothing is left of it: no file, no thread, no limit of MLX.
    """
    assert request.output is not None
    threads, before = threading.active_count(), limits()
    events = pipe.stream(request)
    reached = list(islice(events, count))
    if way == "close":
        events.close()
    else:
        with pytest.raises(Mine):
            events.throw(Mine())
    assert list(Path(request.output).parent.iterdir()) == []
    assert threading.active_count() == threads
    assert limits() == before
    return reached


def test_a_listener_that_fails_ends_the_run_cleanly(pipe: Pipeline, tmp_path: Path) -> None:
    plain = asked(output=str(tmp_path / "a.webp"), memory_budget="off")
    streamed = asked(output=str(tmp_path / "a.webp"), memory_budget="2GB")
    assert isinstance(stopped(pipe, plain, 3, "throw")[-1], StageProgress)
    assert isinstance(stopped(pipe, streamed, 6, "close")[-1], StepFinished)
    assert isinstance(stopped(pipe, streamed, 9, "throw")[-1], StageProgress)
