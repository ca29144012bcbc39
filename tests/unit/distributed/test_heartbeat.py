"""All ranks learn which one died, hung, stopped or failed, and no other is blamed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_sora.distributed.failure import Failure, PeerState, Timeouts
from mlx_sora.distributed.heartbeat import Heartbeat
from mlx_sora.errors import INTERRUPTED, MlxSoraError
from tests.helpers.ranks import free_port

CHILD = (sys.executable, "-m", "tests.helpers.programs.heartbeat_rank")
HOST = socket.gethostname()


@contextmanager
def started(
    folder: Path, behaviours: list[str], coordinator: str | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of ranks that behave so. coordinator: by default a free port."""
    coordinator = f"127.0.0.1:{free_port(1)}" if coordinator is None else coordinator
    ranks = [
        subprocess.Popen(
            [*CHILD, str(rank), str(len(behaviours)), str(folder), coordinator, behaviour],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, behaviour in enumerate(behaviours)
    ]
    try:
        yield ranks
    finally:
        for each in ranks:
            each.kill()
            each.communicate()


def results(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, dict[str, object] | None]]:
    """Exit code of each rank, and the failure that it learnt of."""
    found = []
    for rank in ranks:
        out, err = rank.communicate(timeout=90)
        assert "Traceback" not in err, err
        found.append((rank.returncode, json.loads(out) if out else None))
    return found


KILLED = "was killed: its process ended without an error."
SHORT = "was killed, with 300 MB of memory left on its machine: it may have run out of memory."


@pytest.mark.parametrize(
    ("behaviours", "cause"),
    [
        (["waits", "waits", "dies"], KILLED),
        (["dies", "waits", "waits"], KILLED),
        (["waits", "dies short of memory"], SHORT),
        (["crashes", "waits"], "crashed: Aborted."),
        (["waits", "crashes"], "crashed: Aborted."),
        (["is interrupted", "is interrupted", "dies"], KILLED),
        (["stops", "waits", "waits"], "sent no heartbeat for 4 s: it is stopped or cut off."),
        (["waits", "hangs", "waits"], "hangs: no progress for 4 s."),
        (["waits", "hangs in its GPU"], "hangs: no progress for 5 s."),
        (["waits", "spins"], "hangs: it computes for 3 s without progress."),
        (["waits", "fails", "waits"], "ran out of memory."),
        (["waits", "fails late", "waits"], "ran out of memory."),
        (["waits", "leaves", "waits"], "ended before the others."),
    ],
)
def test_all_ranks_name_the_culprit(tmp_path: Path, behaviours: list[str], cause: str) -> None:
    culprit = next(
        i for i, each in enumerate(behaviours) if each not in ("waits", "is interrupted")
    )
    with started(tmp_path, behaviours) as ranks:
        found = results(ranks)
    del found[culprit]  # a stopped rank learns it too, when it is woken to end
    assert {code for code, _ in found} == {3 if cause.startswith("ran") else 1}
    failures = [failure for _, failure in found if failure is not None]
    assert len(failures) == len(found)
    for failure in failures:
        assert (failure["rank"], failure["host"], failure["cause"]) == (culprit, HOST, cause)
    assert sum(failure["reports"] is True for failure in failures) == 1, "one tells the user"


def test_a_stopped_rank_is_woken_to_end(tmp_path: Path) -> None:
    """The launcher would wait for it for ever."""
    with started(tmp_path, ["waits", "stops"]) as ranks:
        assert [code for code, _ in results(ranks)] == [1, 1]


def test_slow_and_finished_ranks_are_no_failures(tmp_path: Path) -> None:
    with started(tmp_path, ["waits", "computes", "ends"]) as ranks:
        assert results(ranks) == [(0, None)] * 3


def test_ranks_that_work_for_long_are_no_failures(tmp_path: Path) -> None:
    """They sleep in place of their GPU, or compute, for longer than a rank may by itself.

    The last gets as little of a processor as on a loaded machine. All meet by a collective.
    """
    long = ["waits for its GPU", "signs block by block", "computes as planned"]
    behaviours = ["waits", *long, "gets little of a processor"]
    with started(tmp_path, behaviours, coordinator="") as ranks:
        assert results(ranks) == [(0, None)] * 5


def test_ranks_that_are_stopped_together_blame_nobody(tmp_path: Path) -> None:
    """Ctrl-Z stops all for longer than a rank may be silent; then they go on."""
    with started(tmp_path, ["waits", "waits"]) as ranks:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        for number, pause in ((signal.SIGSTOP, 5), (signal.SIGCONT, 0)):
            for each in ranks:
                each.send_signal(number)
            time.sleep(pause)
        assert results(ranks) == [(0, None)] * 2


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, missing: int) -> None:
    behaviours = ["is interrupted early", "is interrupted early"]  # by the launcher
    behaviours[missing] = "does not come"
    with started(tmp_path, behaviours) as ranks:
        code, failure = results(ranks)[1 - missing]
    assert failure is not None
    assert (code, failure["rank"], failure["reports"]) == (INTERRUPTED, missing, True)
    assert failure["cause"] == f"had not connected when rank {1 - missing} was interrupted."


def test_a_missing_rank_is_named() -> None:
    alone = Heartbeat(0, 3, "", lambda failure: None, Timeouts(connect=0.2))
    with pytest.raises(MlxSoraError, match=r"Rank 1, 2 did not find rank 0\. Let them"):
        alone.connect(lambda own: [own] * 3)
    alone.close()


def test_others_than_ranks_are_not_listened_to() -> None:
    """Who connects without the run's token cannot end it."""
    found: list[Failure] = []
    port = free_port(1)
    rank0 = Heartbeat(0, 2, f"127.0.0.1:{port}", found.append, Timeouts(0.1, connect=0.5))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.3)
        asking.connect(("127.0.0.1", port))
        asking.send(b"who are you?")
        with pytest.raises(TimeoutError):
            asking.recv(4096)
        asking.send(b"mlx_sora: where is rank 0?")
        address = json.loads(asking.recv(4096))
    for hello in ({"rank": 1, "token": "x"}, {"rank": 7, "token": address["token"]}, {}):
        with socket.create_connection(("127.0.0.1", address["port"])) as stranger:
            lines = [hello | {"pid": 1, "host": "h"}, {"failure": {"rank": 1, "cause": "x"}}]
            stranger.sendall("".join(json.dumps(line) + "\n" for line in lines).encode())
            assert stranger.recv(1) == b""
    assert not rank0.wait_for_rank0(0.2)
    assert (rank0.failure, found) == (None, [])
    rank0.close()


@pytest.mark.parametrize(("share", "idle"), [(0.0024, True), (0.1, False)])
def test_little_processor_time_is_no_progress(share: float, idle: bool) -> None:
    peer = PeerState()
    state = {"collectives": 0, "ticks": 0, "idle": 0.0, "busy": 0.0, "memory": None}
    for second in range(60):
        peer.record_heartbeat(float(second), state | {"cpu_seconds": 5.0 + share * second})
    assert (peer.last_progress == 0.0) is idle
