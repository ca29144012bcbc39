"""A watched rank, for test_heartbeat: RANK SIZE FOLDER BEHAVIOUR. Prints what it learns."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from mlx_sora.distributed import heartbeat as heartbeat_module
from mlx_sora.distributed.heartbeat import Failure, Heartbeat, Timeouts

TIMEOUTS = Timeouts(interval=0.1, silence=2.0, idle=2.5, connect=20.0)


def slow_asdict(failure: Failure) -> dict[str, object]:
    """Return the fields of `failure` after the heartbeat's thread has seen it."""
    time.sleep(0.3)
    return asdict(failure)


def main(rank: int, size: int, folder: Path, behaviour: str) -> None:
    def all_gather(own: bytes) -> list[bytes]:
        (folder / f".{rank}").write_bytes(own)
        (folder / f".{rank}").rename(folder / str(rank))
        files = [folder / str(other) for other in range(size)]
        while not all(file.exists() for file in files):
            time.sleep(0.01)
        return [file.read_bytes() for file in files]

    def stop(failure: Failure) -> None:
        os.write(1, json.dumps(asdict(failure)).encode())
        os._exit(failure.exit_code)

    heartbeat = Heartbeat(rank, size, all_gather, stop, TIMEOUTS)
    heartbeat.begin_collective()
    time.sleep(0.3)
    if behaviour == "dies":
        os._exit(7)
    elif behaviour == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif behaviour in ("fails", "fails late"):
        if behaviour == "fails late":  # the main thread is slow to send the cause
            heartbeat_module.asdict = slow_asdict  # type: ignore[assignment]
        heartbeat.fail("ran out of memory.", 3)
        sys.exit(3)
    elif behaviour == "hangs":
        time.sleep(30)
    elif behaviour == "leaves":
        heartbeat.close()
        return
    elif behaviour == "computes":  # slower than the others, but alive
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            pass
    elif behaviour == "waits for its GPU":  # no processor time for longer than others would wait
        heartbeat.allow_idle(8)
        time.sleep(4)
        heartbeat.allow_idle(0)
    elif behaviour == "hangs in its GPU":
        heartbeat.allow_idle(4)
        time.sleep(30)
    elif behaviour == "signs block by block":
        for _ in range(10):
            time.sleep(0.5)
            heartbeat.tick()
    heartbeat.begin_collective()
    time.sleep(6 if behaviour == "waits" else 0)  # "ends" is done sooner
    heartbeat.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
