"""The cost of `mlx_sora serve`: time that it adds to a job, its memory, its answers under load.

    python -m benchmarks.serve [--runs 5] [--seconds 60] [--json FILE]

A server in a process of its own with 500 finished videos in its list. Jobs of the bundled model are
sent to it and, in turn, made by `python -m mlx_sora generate`, plainly and with the checkpoints and
previews that the server asks for. Then, with one job running: the status of a video, one client at
a time, and 50 clients at once that each ask as often as the server tells them to.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import RESULTS, markdown, write_json
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.store import DONE, Store
from mlx_sora.server.task import Task, new_id

#: Jobs in the list, clients at once, and requests one after the other.
JOBS, CLIENTS, ASKED = 500, 50, 300

#: What the issue allows: share of a job's time, bytes, seconds.
GOALS = {"overhead": 0.03, "memory": 80e6, "status": 0.020}

PROMPT = "a red circle moves right"
OPTIONS = {"model": "shapes", "steps": 60, "num_frames": 51, "seed": 1}

#: Options of the job that runs while clients ask.
LONG = {"steps": 1000, "num_frames": 204}


def fill(folder: Path) -> None:
    """Put finished videos into the list: one that is made, and copies of its row and file."""
    queue = JobQueue(folder)
    queue.start()
    job = queue.submit(Task(options={"prompt": PROMPT, "steps": 4, "seed": 1}))
    while queue.get(job.id).state != DONE:
        time.sleep(0.1)
    job, content = queue.get(job.id), queue.content(job.id).read_bytes()
    queue.stop()
    store = Store(folder / "jobs.db")
    for _ in range(JOBS - 1):
        id = new_id("video_")
        (folder / "videos" / f"{id}.mp4").write_bytes(content)
        store.add(replace(job, id=id, output=f"{id}.mp4"))
    store.close()


@dataclass
class Server:
    """A running server. process: of the server itself, without workers."""

    process: psutil.Process
    port: int

    @property
    def cpu(self) -> float:
        """Seconds that the server has computed."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection, which a client keeps."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request and return the answer."""
        connection = self.connect()
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps(body or {}), headers)
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        connection.close()
        if response.status >= 400:
            raise SystemExit(answer["error"]["message"])
        return answer

    def get(self, path: str) -> Any:
        """Return the answer to a request."""
        connection = self.connect()
        connection.request("GET", path)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Start a server on a free port."""
    words = [sys.executable, "-m", "mlx_sora", "serve", "--folder", str(folder), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip().rstrip("/")
    try:
        yield Server(psutil.Process(process.pid), int(address.rpartition(":")[2]))
    finally:
        process.terminate()
        process.wait()


def make_job(server: Server) -> float:
    """Return the seconds from sending a job until it is finished, by the server's clock."""
    began = time.time()
    id = server.post("/v1/videos", {"prompt": PROMPT, **OPTIONS})["id"]
    while (video := server.get(f"/v1/videos/{id}"))["status"] in ("queued", "in_progress"):
        time.sleep(0.5)
    if video["status"] != "completed":
        raise SystemExit(f"the job is {video['status']}: {video['error']}")
    with sqlite(server) as store:
        return float(store.get(id).finished_at or 0) - began


@contextmanager
def sqlite(server: Server) -> Iterator[Store]:
    """Open the database beside the server."""
    folder = server.process.cmdline()[server.process.cmdline().index("--folder") + 1]
    store = Store(Path(folder) / "jobs.db")
    yield store
    store.close()


def run_command(folder: Path, *more: str) -> float:
    """Return the seconds of the same job on the command line."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    words = [sys.executable, "-m", "mlx_sora", "generate", "--prompt", PROMPT, *flags, *more]
    words += ["--json-events", "--overwrite", "-o", str(folder / "a.mp4")]
    began = time.time()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.time() - began


def measure_jobs(server: Server, folder: Path, runs: int) -> dict[str, Any]:
    """Seconds of a job: through the server, on the command line, and there with checkpoints."""
    every = ["--checkpoint-every=6", "--preview-every=6"]
    make_job(server)  # the helper is warm, as while somebody types
    rows = []
    for _ in range(runs):
        rows.append((make_job(server), run_command(folder), run_command(folder, *every)))
        print("job {:.2f} s, command {:.2f} s, with checkpoints {:.2f} s".format(*rows[-1]))
    served, plain, equal = zip(*rows, strict=True)
    ratio = [
        statistics.median(a / b for a, b in zip(served, c, strict=True)) for c in (plain, equal)
    ]
    return {
        "served": statistics.median(served),
        "plain": statistics.median(plain),
        "with_checkpoints": statistics.median(equal),
        "overhead": ratio[0] - 1,
        "overhead_of_the_queue": ratio[1] - 1,
    }


@dataclass
class Answers:
    """Seconds of answers, and what went wrong."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def ask(self, connection: http.client.HTTPConnection, path: str) -> float:
        """Ask once; return the seconds that the server wants between two questions."""
        began = time.perf_counter()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.errors.append(repr(error))
            return 0.5
        self.seconds.append(time.perf_counter() - began)
        if response.status != 200:
            self.errors.append(f"status {response.status}")
        return float(response.headers.get("openai-poll-after-ms", 500)) / 1000

    def summary(self) -> dict[str, Any]:
        """Median, slow and slowest answers, and errors."""
        found = sorted(self.seconds)
        return {
            "answers": len(found),
            "median": statistics.median(found),
            "p99": found[int(len(found) * 0.99)],
            "slowest": found[-1],
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
        }


def measure_status(server: Server, id: str) -> dict[str, Any]:
    """Ask for a video, and for the first page of the list, one client at a time."""
    connection, status, page = server.connect(), Answers(), Answers()
    before = server.cpu
    for _ in range(ASKED):
        status.ask(connection, f"/v1/videos/{id}")
        page.ask(connection, "/v1/videos?limit=20")
        time.sleep(0.02)
    connection.close()
    computed = (server.cpu - before) / (2 * ASKED)
    return {"status": status.summary(), "list": page.summary(), "cpu_per_answer": computed}


def measure_clients(server: Server, id: str, seconds: float) -> dict[str, Any]:
    """Let many clients ask at once for a while."""
    answers, end = Answers(), time.monotonic() + seconds

    def client(number: int) -> None:
        time.sleep(number / CLIENTS / 2)
        connection = server.connect()
        while time.monotonic() < end:
            time.sleep(answers.ask(connection, f"/v1/videos/{id}"))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"clients": CLIENTS, "seconds": seconds, **answers.summary()}


def measure(runs: int, seconds: float) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "server"
        fill(folder)
        with running(folder) as server:
            first = server.process.memory_info().rss
            found: dict[str, Any] = {
                "jobs_in_list": JOBS,
                "job": measure_jobs(server, Path(name), runs),
            }
            id = server.post("/v1/videos", {"prompt": PROMPT, **OPTIONS, **LONG})["id"]
            while server.get(f"/v1/videos/{id}")["status"] == "queued":
                time.sleep(0.1)
            found |= measure_status(server, id)
            found["polling"] = measure_clients(server, id, seconds)
            found["still_running"] = server.get(f"/v1/videos/{id}")["status"] == "in_progress"
            found["memory"] = {"first": first, "last": server.process.memory_info().rss}
            server.post(f"/v1/videos/{id}/cancel")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=60, help="of 50 clients; default 60")
    parser.add_argument("--json", type=Path, help=f"such as {RESULTS / 'serve.json'}")
    options = parser.parse_args()
    found = measure(options.runs, options.seconds)
    job, status, polling = found["job"], found["status"], found["polling"]
    rows = [
        ("time added to a job", f"{job['overhead']:+.1%}", f"{GOALS['overhead']:.0%}"),
        ("of it without checkpoints, previews", f"{job['overhead_of_the_queue']:+.1%}", ""),
        ("memory of the server", f"{found['memory']['last'] / 1e6:.0f} MB", "80 MB"),
        (f"status, {JOBS} jobs, one running", f"{status['median'] * 1e3:.1f} ms", "20 ms"),
        ("first page of the list", f"{found['list']['median'] * 1e3:.1f} ms", ""),
        ("computed for one of these", f"{found['cpu_per_answer'] * 1e3:.1f} ms", ""),
        (
            f"{CLIENTS} clients for {options.seconds:.0f} s",
            f"{polling['answers']} answers, {polling['errors']} errors, median "
            f"{polling['median'] * 1e3:.1f} ms",
            "0 errors",
        ),
    ]
    print(markdown(("figure", "measured", "goal"), rows))
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
