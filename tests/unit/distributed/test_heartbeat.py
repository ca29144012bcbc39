"""All ranks learn which one died, hung, stopped or failed, and no other is blamed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_sora.distributed import heartbeat
from mlx_sora.distributed.heartbeat import Heartbeat, Timeouts
from mlx_sora.errors import MlxSoraError

CHILD = (sys.executable, "-m", "tests.helpers.programs.heartbeat_rank")


def run_ranks(folder: Path, behaviours: list[str]) -> list[tuple[int, dict[str, object] | None]]:
    """Exit code of each rank, and the failure that it reported."""
    ranks = [
        subprocess.Popen(
            [*CHILD, str(rank), str(len(behaviours)), str(folder), behaviour],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, behaviour in enumerate(behaviours)
    ]
    results = []
    for rank, behaviour in zip(ranks, behaviours, strict=True):
        if behaviour == "stops":  # never ends by itself
            results.append((-signal.SIGSTOP, None))
            continue
        out, _ = rank.communicate(timeout=30)
        results.append((rank.returncode, json.loads(out) if out else None))
    for rank in ranks:
        rank.kill()
        rank.communicate()
    return results


@pytest.mark.parametrize(
    ("behaviours", "cause"),
    [
        (["waits", "waits", "dies"], "has died."),
        (["dies", "waits", "waits"], "has died."),
        (["stops", "waits", "waits"], "sent no heartbeat for 2 s."),
        (["waits", "hangs", "waits"], "hangs: no progress for 2.5 s."),
        (["waits", "hangs in its GPU"], "hangs: no progress for 4 s."),
        (["waits", "fails", "waits"], "ran out of memory."),
        (["waits", "fails late", "waits"], "ran out of memory."),
        (["waits", "leaves", "waits"], "ended before the others."),
    ],
)
def test_all_ranks_name_the_culprit(tmp_path: Path, behaviours: list[str], cause: str) -> None:
    culprit = next(rank for rank, each in enumerate(behaviours) if each != "waits")
    for rank, (code, failure) in enumerate(run_ranks(tmp_path, behaviours)):
        if rank != culprit:
            assert failure is not None
            assert (failure["rank"], failure["cause"]) == (culprit, cause)
            assert code == failure["exit_code"]


def test_slow_and_finished_ranks_are_no_failures(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, ["waits", "computes", "ends"])
    assert found == [(0, None)] * 3


def test_ranks_that_wait_for_their_gpu_are_no_failures(tmp_path: Path) -> None:
    """They sleep in its place, for longer than a rank may be idle."""
    behaviours = ["waits", "waits for its GPU", "signs block by block"]
    assert run_ranks(tmp_path, behaviours) == [(0, None)] * 3


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(MlxSoraError, match=r"Rank 1, 2 did not find rank 0\. Let them"):
        Heartbeat(0, 3, lambda own: [own] * 3, lambda failure: None, Timeouts(connect=0.2))


@pytest.mark.parametrize(("share", "idle"), [(0.0024, True), (0.1, False)])
def test_little_processor_time_is_no_progress(
    share: float, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    peer = heartbeat.PeerState()
    for second in range(60):
        now = float(second)
        peer.record_heartbeat(0, 0, 5.0 + share * second)
    assert (peer.last_progress == 0.0) is idle
