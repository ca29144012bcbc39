"""The number of BLAS threads follows what other programs leave free, unless the user sets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_sora.runtime import blas
from mlx_sora.runtime.blas import AdaptiveThreads, Processors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")

SECOND = 100
CHILD = """
from mlx_sora.runtime import blas
threads = blas.install().threads
print("user" if threads is None else f"{threads.most} {threads.read()}")
"""


class Machine:
    """Counters of a machine with four processors, of which this process may use the first two."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.own = folder / "stat", 0.0
        self.ticks = [[0, 0] for _ in range(4)]  # busy and idle
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
        monkeypatch.setattr(os, "sysconf", lambda name: SECOND)
        monkeypatch.setattr(
            os, "times", lambda: SimpleNamespace(user=self.own / 2, system=self.own / 2)
        )
        self.spend(0, (0, 0, 0, 0))

    def spend(self, seconds: float, busy: tuple[float, ...], own: float = 0) -> None:
        """Let time pass. busy: share of each processor. own: seconds of this process."""
        self.own += own
        lines = ["cpu  9 9 9 9 9 9 9 9 0 0"]
        for index, (ticks, share) in enumerate(zip(self.ticks, busy, strict=True)):
            ticks[0] += round(seconds * SECOND * share)
            ticks[1] += round(seconds * SECOND * (1 - share))
            lines.append(f"cpu{index} {ticks[0]} 0 0 {ticks[1]} 0 0 0 0 0 0")
        self.file.write_text("\n".join([*lines, "intr 5", "ctxt 6"]))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_what_others_use_is_not_free(machine: Machine) -> None:
    processors = Processors(machine.file)
    machine.spend(10, (1, 0.5, 1, 1), own=5)
    assert processors.free() == pytest.approx(1.0), "15 busy seconds, of which 5 are our own"
    machine.spend(10, (1, 1, 0, 0), own=20)
    assert processors.free() == pytest.approx(2.0)
    machine.spend(0.05, (1, 1, 0, 0))
    assert processors.free() is None, "too soon"
    machine.file.write_text("cpu")
    assert processors.free() is None
    assert Processors(machine.file.with_name("none")).free() is None


def test_threads_follow_and_return(machine: Machine) -> None:
    used = [2]
    threads = AdaptiveThreads(lambda: used[-1], used.append, Processors(machine.file))
    for busy, own in (((1, 1, 0, 0), 2), ((1, 1, 0, 0), 20), ((0.1, 0.1, 0, 0), 1)):
        machine.spend(10, busy, own)
        threads.adapt()
    assert used == [2, 1, 2]
    used.append(3)  # by the program that we are part of
    machine.spend(10, (1, 1, 0, 0))
    threads.adapt()
    assert used[-1] == 3


@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"])
def test_the_number_of_the_user_stays(name: str) -> None:
    if not list(Path(blas.__file__).parent.glob("_cblas*.so")):
        pytest.skip("installed without a C compiler")
    others = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")
    env = {key: value for key, value in os.environ.items() if key not in others}
    words = [sys.executable, "-c", CHILD]
    free = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0))
    assert free.stdout.split() == [str(cores), str(cores)]
    own = subprocess.run(words, env={**env, name: "2"}, capture_output=True, text=True, check=True)
    assert own.stdout.strip() == "user"
