"""Reads of weights that fail, come short or wait in the file system, below Python and MLX."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.longrun.table import Fault

SOURCE = Path(__file__).with_name("flaky_reads.c")

#: Streams both networks of blocks twice and loads the VAE; prints a checksum of all weights of each
#: part, or the error, as JSON. The process ends by itself, with no thread left.
PROGRAM = """
import hashlib, json, sys, threading
import mlx_sora
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_sora import MlxSoraError
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.loading import file_guard, networks
from mlx_sora.loading.model_folder import find_model
from mlx_sora.runtime.device import to_numpy

file_guard.RETRY_DELAYS = (0.0, 0.0)
model, found = find_model("shapes"), {}

def add(digest, parameters):
    for name, array in tree_flatten(parameters):
        digest.update(name.encode() + to_numpy(array).tobytes())

def stream(part, load):
    network, source = load(model, mx.float32)[:2]
    source = source if hasattr(source, "reader") else load(model, mx.float32)[-1]
    digest = hashlib.sha256()
    with file_guard.WeightFileGuard(getattr(model, part)).check_reads():
        add(digest, network.parameters())
    with BlockStream(source, cyclic=True) as blocks:
        for index in [*range(len(source))] * 2:
            block = blocks.get(index)
            parts = block if isinstance(block, (tuple, list)) else (block,)
            for part in parts:
                add(digest, part.parameters())
            blocks.release(index, mx.zeros(1))
    return digest.hexdigest()

def vae():
    digest = hashlib.sha256()
    with file_guard.WeightFileGuard(model.vae).check_reads():
        add(digest, networks.load_vae(model).parameters())
    return digest.hexdigest()

readers = {
    "transformer": lambda: stream("transformer", networks.stream_transformer),
    "text_encoder": lambda: stream("text_encoder", networks.stream_text_encoder),
    "vae": vae,
}
for part, read in readers.items():
    try:
        found[part] = read()
    except MlxSoraError as error:
        found[part] = {"error": str(error)}
left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
print(json.dumps([found, left]))
"""

#: Videos one after the other in one process: an error of one must not surface in the next. Prints
#: checksum or error of each.
VIDEOS = """
import hashlib, json
from mlx_sora import MlxSoraError, Pipeline
from mlx_sora.loading import file_guard

file_guard.RETRY_DELAYS = (0.0, 0.0)
pipe, found, left = Pipeline.from_pretrained("shapes"), {}, []
ways = ({}, {"ci_dl": True}, {"health_check": False}, {"ci_dl": True, "preview_every": 1})
for number, way in enumerate([*ways, *ways]):
    try:
        video = pipe("a red circle", seed=1, steps=2, num_frames=17, **way)
        found[f"video {number}"] = hashlib.sha256(video.frames.tobytes()).hexdigest()
    except MlxSoraError as error:
        found[f"video {number}"] = {"error": str(error)}
print(json.dumps([found, left]))
"""


@dataclass(frozen=True)
class Outcome:
    """One process: checksum or error of each part; reads, failures, short reads, waits."""

    parts: dict[str, str | dict[str, str]]
    counts: tuple[int, ...]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk that fails, compiled."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux's LD_PRELOAD")
    out = tmp_path_factory.mktemp("flaky") / "flaky_reads.so"
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(out), str(SOURCE), "-ldl"]
    subprocess.run(words, check=True)
    return out


def read_all(library: Path, plan: str, program: str = PROGRAM) -> Outcome:
    """Run a program whose reads of weights go as planned: "seed fail short wait"."""
    counts = library.with_suffix(".counts")
    counts.write_bytes(bytes(32))
    flaky = {"LD_PRELOAD": str(library), "FLAKY": plan, "FLAKY_COUNTS": str(counts)}
    made = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | flaky,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    parts, threads = json.loads(made.stdout)
    assert threads == []
    return Outcome(parts, struct.unpack("<4Q", counts.read_bytes()))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("fail", "40 0 0"),
        ("come short", "0 5000 0"),
        ("wait 0.1 s", "0 0 100"),
        ("all", "30 2000 50"),
    ],
)
def test_reads_in_the_file_system(library: Path, fault: Fault, name: str, rates: str) -> None:
    """Every weight is exact, or an error of one line names the folder."""
    expected, runs = read_all(library, "0 0 0 0"), 30
    assert expected.counts[0] > 100
    assert expected.counts[1:] == (0, 0, 0)
    ends, totals = Counter[str](), [0] * 4
    for seed in range(1, runs + 1):
        found = read_all(library, f"{seed} {rates}")
        totals = [a + b for a, b in zip(totals, found.counts, strict=True)]
        for part, result in found.parts.items():
            if isinstance(result, dict):
                assert part in result["error"], result
                assert "read" in result["error"].lower(), result
                ends["errors"] += 1
            else:
                assert result == expected.parts[part], part
                ends["exact"] += 1
    assert ends["exact"], "no run came through"
    assert any(totals[1:]), "nothing happened"
    failing = int(rates.split(maxsplit=1)[0]) > 0
    assert bool(ends["errors"]) == failing, ends
    _, failed, short, waits = totals
    result = f"{failed} failed, {short} short, {waits} waited; {ends['exact']} of {3 * runs} parts "
    result += "exact in every weight, the others an error that names them"
    fault(f"reads {name}", "all weights, in the file system", runs, 0, result)


def test_videos_of_reads_that_fail(library: Path, fault: Fault) -> None:
    """Each is exact, or ends with an error of one line; none harms those that follow."""
    expected, ends, failed, runs = read_all(library, "0 0 0 0", VIDEOS), Counter[str](), 0, 12
    for seed in range(1, runs + 1):
        found = read_all(library, f"{seed} 30 1000 20", VIDEOS)
        failed += found.counts[1]
        for name, result in found.parts.items():
            if isinstance(result, dict):
                assert "read" in result["error"] or "load" in result["error"], result
                ends["errors"] += 1
            else:
                assert result == expected.parts[name], (seed, name)
                ends["exact"] += 1
    assert ends["exact"]
    assert ends["errors"]
    result = f"{failed} failed reads; {ends['exact']} exact, {ends['errors']} an error of one line"
    fault("reads fail, eight videos in one process", "all", 8 * runs, 0, result)
