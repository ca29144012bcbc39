"""Disks that are full, read-only, gone or flaky, at every place of a file and at random ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.errors import MlxSoraError, WeightsError
from mlx_sora.loading.model_folder import ModelFolder, find_model
from mlx_sora.loading.networks import stream_transformer
from mlx_sora.pipeline.locks import output_lock
from mlx_sora.video.output_path import existing_files
from mlx_sora.video.writer import open_writer, save_frames, write_sidecar
from tests.helpers.block_reader import loaders
from tests.longrun.table import Fault
from tests.unit.video.test_faults import KINDS, NOISE, files_up_to, killed_holder

#: Sizes that are tried per kind of output.
SIZES = 40

#: Fewest of them that fail, and that succeed.
MINIMUM = 3


def whole(path: Path, frames: int) -> bool:
    """Whether a finished output can be read to its end."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0)) == frames
    from PIL import Image

    files = existing_files(path)
    if len(files) != (frames if "%" in path.name else 1):
        return False
    for file in files:
        with Image.open(file) as image:
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
    return True


def attempt(folder: Path, name: str) -> str:
    """Write into `folder`: whole, refused, or lost where it is neither all nor nothing."""
    record = {"request": {"prompt": "a"}}
    with suppress(MlxSoraError):  # anything else is no answer
        path = save_frames(folder / name, NOISE, 8, record)
        write_sidecar(path, record | {"text": "a" * 2000})
    finals = existing_files(folder / name)
    broken = bool(finals) and not whole(folder / name, len(NOISE))
    extra = [file for file in folder.rglob("*") if file.is_file() and file not in finals]
    for file in extra:
        if file.suffix != ".json":
            return "lost"
        json.loads(file.read_text())  # whole, if it is there
    return "lost" if broken else "whole" if finals else "refused"


def report(fault: Fault, kind: str, name: str, ends: Counter[str]) -> None:
    """Add the row of a kind of disk, on which some must fail and some succeed."""
    result = f"{ends['whole']} whole, {ends['refused']} refused, nothing left"
    fault(kind, f"write {name}", ends.total(), ends["lost"], result)
    assert ends["lost"] == 0
    assert ends["whole"] >= MINIMUM
    assert ends["refused"] >= MINIMUM


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_may_not_grow(tmp_path: Path, fault: Fault, name: str) -> None:
    probe = tmp_path / "probe"
    probe.mkdir()
    save_frames(probe / name, NOISE, 8)
    largest = max(file.stat().st_size for file in existing_files(probe / name))
    ends = Counter[str]()
    for number in range(SIZES):
        folder = tmp_path / str(number)
        folder.mkdir()
        with files_up_to(largest * number // (SIZES - 10)):
            ends[attempt(folder, name)] += 1
    report(fault, "files may not grow beyond n bytes", name, ends)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own; needs root."""
    folder.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_disk_that_is_full(tmp_path: Path, fault: Fault, name: str) -> None:
    ends = Counter[str]()
    for pages in [*range(1, 31), *range(35, 135, 10)]:
        with small_disk(tmp_path / "disk", 4096 * pages):
            ends[attempt(tmp_path / "disk", name)] += 1
    report(fault, "disk of n pages is full", name, ends)


def write_until_it_is_read_only(folder: Path, name: str) -> None:
    with open_writer(folder / name, 64, 64, 8) as writer:
        writer.write(NOISE)
        if name.endswith(".mp4"):  # what is open for writing keeps a disk from being remounted
            raise OSError(30, "Read-only file system")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_a_disk_that_becomes_read_only(tmp_path: Path, fault: Fault, name: str) -> None:
    for _ in range(10):
        with small_disk(tmp_path / "disk", 1 << 20):
            with pytest.raises(MlxSoraError, match="Cannot write"):
                write_until_it_is_read_only(tmp_path / "disk", name)
            assert list((tmp_path / "disk").iterdir()) == []
    fault("disk becomes read-only", f"write {name}", 10, 0, "an error, nothing left")


def test_weights_that_come_to_harm_at_random(tmp_path: Path, fault: Fault) -> None:
    """Cut, rewritten, exchanged or removed while they are streamed: the error names the file."""
    source = find_model("shapes").path / "transformer"
    runs = 100
    for seed in range(runs):
        chance = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(source, folder / "transformer")
        for part in source.parent.iterdir():
            if part.name != "transformer":
                (folder / part.name).symlink_to(part)
        model = ModelFolder.open(folder)
        file = next((folder / "transformer").glob("*.safetensors"))
        with pytest.raises(WeightsError, match=file.name):
            stream_while(model, chance, lambda file=file, chance=chance: harm(file, chance))
        assert loaders() == 0
        shutil.rmtree(folder)
    fault("weights cut, rewritten, exchanged, removed", "denoise, streamed", runs, 0, "named")


def harm(file: Path, chance: random.Random) -> None:
    size = file.stat().st_size
    other = file.with_name("other")
    kind = chance.choice(("cut", "rewrite", "exchange", "remove"))
    if kind == "cut":
        os.truncate(file, chance.randrange(size))
    elif kind == "rewrite":
        file.write_bytes(np.random.default_rng(0).bytes(size))
    elif kind == "exchange":
        shutil.copyfile(file, other)
        other.replace(file)
    else:
        file.unlink()


def stream_while(model: ModelFolder, chance: random.Random, act: Callable[[], None]) -> None:
    """Stream all blocks five times; `act` before one of them."""
    _, source = stream_transformer(model, mx.float32)
    at = chance.randrange(3 * len(source))
    with BlockStream(source, cyclic=True) as blocks:
        for number, index in enumerate([*range(len(source))] * 5):
            if number == at:
                act()
            spatial, _ = blocks.get(index)
            blocks.release(index, mx.sum(spatial.mlp.fc1.weight))


def test_holders_of_an_output_that_are_killed(tmp_path: Path, fault: Fault) -> None:
    output = tmp_path / "a.mp4"
    for _ in range(20):
        killed_holder(output)
        with output_lock(output):
            output.touch()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    fault("two runs on one output, the first is killed", "all", 20, 0, "refused, then free")
