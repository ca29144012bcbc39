"""A watched rank, for test_heartbeat: RANK SIZE FOLDER COORDINATOR BEHAVIOUR.

Prints the failure that it learns of.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from mlx_sora.distributed import heartbeat as heartbeat_module
from mlx_sora.distributed.failure import Failure, Timeouts
from mlx_sora.distributed.heartbeat import Heartbeat

TIMEOUTS = Timeouts(interval=0.1, silence=4.0, idle=4.0, busy=3.0, connect=20.0, farewell=0.5)


def slow_asdict(failure: Failure) -> dict[str, object]:
    """Return the fields of `failure` after the heartbeat's thread has seen it."""
    time.sleep(0.3)
    return asdict(failure)


def compute(seconds: float) -> None:
    """Use the processor."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def fail(heartbeat: Heartbeat, behaviour: str) -> None:
    """Fail in the way that `behaviour` names, if it names one."""
    if behaviour.startswith("dies"):
        os._exit(7)
    elif behaviour == "crashes":
        os.abort()
    elif behaviour == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(30)
    elif behaviour in ("fails", "fails late"):
        if behaviour == "fails late":  # the main thread is slow to send the cause
            heartbeat_module.asdict = slow_asdict  # type: ignore[assignment]
        heartbeat.fail("ran out of memory.", 3)
        sys.exit(3)
    elif behaviour == "hangs":
        time.sleep(30)
    elif behaviour == "hangs in its GPU":
        heartbeat.allow_silence(5, 5)
        time.sleep(30)
    elif behaviour == "spins":
        compute(60)


def work(heartbeat: Heartbeat, behaviour: str) -> None:
    """Work as `behaviour` says; a rank that does is not at fault."""
    if behaviour == "computes":  # slower than the others, but alive
        compute(2.5)
    elif behaviour == "computes as planned":
        heartbeat.allow_silence(0, 20)
        compute(5)
    elif behaviour == "gets little of a processor":
        for _ in range(50):
            compute(0.01)
            time.sleep(0.09)
    elif behaviour == "waits for its GPU":  # no processor time for longer than others would wait
        heartbeat.allow_silence(9, 9)
        time.sleep(5)
        heartbeat.allow_silence(0, 0)
    elif behaviour == "signs block by block":
        for _ in range(10):
            time.sleep(0.5)
            heartbeat.tick()


def main(rank: int, size: int, folder: Path, coordinator: str, behaviour: str) -> None:
    def all_gather(own: bytes) -> list[bytes]:
        (folder / f".{rank}").write_bytes(own)
        (folder / f".{rank}").rename(folder / str(rank))
        files = [folder / str(other) for other in range(size)]
        while not all(file.exists() for file in files):
            time.sleep(0.01)
        return [file.read_bytes() for file in files]

    def stop(failure: Failure) -> None:
        os.write(1, json.dumps({**asdict(failure), "reports": failure.reporter == rank}).encode())
        os._exit(failure.exit_code)

    if behaviour == "dies short of memory":
        heartbeat_module.available_ram = lambda: 300_000_000
    if behaviour == "does not come":
        return
    heartbeat = Heartbeat(rank, size, coordinator, stop, TIMEOUTS)
    if behaviour == "is interrupted early":
        heartbeat.interrupt()
        time.sleep(30)
    heartbeat.meet()
    heartbeat.connect(all_gather)
    heartbeat.begin_collective()
    if behaviour == "is interrupted":  # as launchers do when another rank has died
        time.sleep(0.1)
        heartbeat.interrupt()
        time.sleep(30)
    time.sleep(0.3)
    fail(heartbeat, behaviour)
    if behaviour == "leaves":
        heartbeat.close()
        return
    work(heartbeat, behaviour)
    heartbeat.begin_collective()
    time.sleep(6 if behaviour == "waits" else 0)  # "ends" is done sooner
    heartbeat.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
