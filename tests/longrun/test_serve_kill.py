"""A server and its workers that are killed at random moments: no job and no video is lost.

The server always has a few jobs. It, or the worker, is killed; what is in the folder is looked at;
and the server is started again. In the end every job that was ever accepted has its video, with
the frames of an undisturbed run.
"""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlx_sora.errors import MlxSoraError
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.task import Task
from mlx_sora.video.reader import is_video, read_image, read_video
from tests.helpers.queue import ended
from tests.longrun.table import Fault
from tests.longrun.test_disk import small_disk

KILLS = 40

#: Times at which a disk is full.
FULL_DISKS = 12

#: Jobs by the prompt that tells them apart.
OPTIONS = {
    "a red circle": {"steps": 12, "num_frames": 17, "output": "webp"},
    "a blue square": {"steps": 24, "num_frames": 1},
    "a green circle": {"steps": 6, "num_frames": 34, "loop": 2, "output": "webp"},
}

SERVER = """
import json, sys, time
from pathlib import Path
from mlx_sora.errors import MlxSoraError
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.task import Task

folder, options, accept = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "accept"
queue = JobQueue(folder)
for notice in queue.notices:
    print("notice", notice, flush=True)
queue.start()
number = len(queue.list(limit=-1))
while True:
    waiting = queue.list(limit=-1, states=("queued", "running"))
    if accept and len(waiting) < 3:
        prompt = list(options)[number % len(options)]
        job = queue.submit(Task(options={"prompt": prompt, "seed": 3, **options[prompt]}))
        print("job", job.id, flush=True)
        number += 1
    time.sleep(0.05)
"""


def start(folder: Path, log: Path, mode: str = "accept") -> subprocess.Popen[bytes]:
    """Start the server. Its lines go to the end of a file, which outlives it."""
    with log.open("ab") as output:
        words = [sys.executable, "-c", SERVER, str(folder), json.dumps(OPTIONS), mode]
        return subprocess.Popen(words, stdout=output, stderr=output)


def jobs(folder: Path) -> dict[str, tuple[str, dict[str, object]]]:
    """Return state and data of all jobs, read as another program would."""
    path = folder / "jobs.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=20)) as database, suppress(sqlite3.OperationalError):
        rows = database.execute("SELECT id, state, data FROM jobs").fetchall()
        return {id: (state, json.loads(data)) for id, state, data in rows}
    return {}


def worker(folder: Path) -> int | None:
    """Return the process of the running job."""
    for state, data in jobs(folder).values():
        if state == "running" and isinstance(data.get("worker"), list):
            return int(data["worker"][0])  # type: ignore[index]
    return None


def frames(path: Path) -> np.ndarray:
    """Return the frames of a file, uint8 [F, H, W, 3]."""
    return read_video(path).frames if is_video(path) else read_image(path)[None]


def check_videos(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Look at every file that has the name of a video."""
    found = jobs(folder)
    for path in (folder / "videos").glob("video_*"):
        if path.name.count(".") == 1:
            prompt = found[path.stem][1]["task"]["options"]["prompt"]  # type: ignore[index]
            assert (frames(path) == expected[prompt]).all(), path


def running_worker(folder: Path, server: subprocess.Popen[bytes], log: Path) -> psutil.Process:
    """Wait for a running job and return its process."""
    end = time.monotonic() + 300
    while True:
        with suppress(psutil.Error):
            if (number := worker(folder)) is not None:
                process = psutil.Process(number)
                if process.status() != psutil.STATUS_ZOMBIE:
                    return process
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


@dataclass(frozen=True)
class Undisturbed:
    """Frames of each kind of job by its prompt, and the seconds of a job."""

    frames: dict[str, np.ndarray]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return what a server makes that nobody disturbs."""
    queue, found = JobQueue(tmp_path_factory.mktemp("whole")), {}
    queue.start()
    began = time.monotonic()
    for prompt, options in OPTIONS.items():
        job = ended(
            queue, queue.submit(Task(options={"prompt": prompt, "seed": 3, **options})), 300
        )
        assert job.state == "done", job.error
        found[prompt] = frames(queue.content(job.id))
    queue.stop()
    return Undisturbed(found, (time.monotonic() - began) / len(OPTIONS))


def kill_often(
    folder: Path, log: Path, undisturbed: Undisturbed
) -> tuple[subprocess.Popen[bytes], Counter[str]]:
    """Kill workers and servers in turn; return the last server, and how many died of it."""
    draw, victims = random.Random(17), Counter[str]()
    server = start(folder, log)
    while victims.total() < KILLS:
        if draw.random() < 0.8:  # else perhaps while it starts
            running_worker(folder, server, log)
        time.sleep(draw.uniform(0, undisturbed.seconds))
        if victims.total() % 2:
            server.kill()
            victims["server"] += server.wait() == -signal.SIGKILL
            check_videos(folder, undisturbed.frames)
            server = start(folder, log)
        else:
            process = running_worker(folder, server, log)
            with suppress(psutil.Error):
                process.kill()
                victims["worker"] += 1
    server.kill()
    server.wait()
    return start(folder, log, "finish"), victims


def test_kills_lose_nothing(tmp_path: Path, undisturbed: Undisturbed, fault: Fault) -> None:
    folder, log = tmp_path / "server", tmp_path / "log"
    server, victims = kill_often(folder, log, undisturbed)
    try:
        end = time.monotonic() + 600
        while any(state in ("queued", "running") for state, _ in jobs(folder).values()):
            assert time.monotonic() < end, jobs(folder)
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
    finally:
        server.kill()
        server.wait()
    accepted = {line.split()[1] for line in log.read_text().splitlines() if line[:4] == "job "}
    found = jobs(folder)
    assert accepted <= found.keys()
    failed = {id: data["error"] for id, (state, data) in found.items() if state != "done"}
    assert failed == {}, log.read_text()
    check_videos(folder, undisturbed.frames)
    assert len(list((folder / "videos").iterdir())) == len(found), "something was left"
    assert "Traceback" not in log.read_text(), log.read_text()
    resumed = sum(int(str(data["attempts"])) > 1 for _, data in found.values())
    assert resumed > 0
    for victim, count in victims.items():
        result = f"{len(found)} videos whole, {resumed} of them after a restart, same frames"
        fault("SIGKILL", f"serve: {victim}", count, 0, result)


def test_a_full_disk_loses_nothing(tmp_path: Path, undisturbed: Undisturbed, fault: Fault) -> None:
    """The disk is full at random moments, and has room again; what failed is resumed."""
    draw, refusals = random.Random(17), list[str]()
    folder = tmp_path / "disk"
    with small_disk(folder, 2_000_000):
        queue = JobQueue(folder / "server")
        queue.start()
        accepted = []
        filler = folder / "filler"
        for number in range(FULL_DISKS):
            prompt = list(OPTIONS)[number % len(OPTIONS)]
            options = {"prompt": prompt, "seed": 3, **OPTIONS[prompt]}
            try:
                accepted.append((prompt, queue.submit(Task(options=options))))
            except MlxSoraError as error:
                refusals.append(str(error))
            time.sleep(draw.uniform(0.1, undisturbed.seconds))
            with suppress(OSError), filler.open("ab") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            time.sleep(draw.uniform(0.1, 4))
            filler.unlink(missing_ok=True)
        assert all("Make room" in refusal for refusal in refusals), refusals
        for prompt, job in accepted:
            while ended(queue, job, 300).state == "failed":
                queue.resume(job.id)
            assert queue.get(job.id).state == "done"
            assert (frames(queue.content(job.id)) == undisturbed.frames[prompt]).all()
        queue.stop()
    result = "failed jobs said why in one line; same frames after a resume"
    fault("full disk", "serve", FULL_DISKS, 0, result)
