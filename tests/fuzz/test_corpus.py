"""Every input that once broke a reader, and every input that fuzzing starts from, again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CORPUS
from tests.fuzz.targets import TARGETS
from tests.fuzz.verdict import MAX_LEAK, judge, leak

#: In place of the fuzzer: two findings, of which the second is the end of the process.
FUZZER = """
import os
from contextlib import nullcontext

def instrument_imports(include):
    return nullcontext()

def Setup(flags, once, custom_mutator):
    global run, prefix
    run = once
    (prefix,) = (f.partition("=")[2] for f in flags if f.startswith("-artifact_prefix="))

def Fuzz():
    from tests.fuzz.targets import TARGETS
    object.__setattr__(TARGETS["strategy"], "run", lambda data, folder: 1 / 0)
    run(b"x")
    with open(prefix + "oom-0123", "wb") as file:
        file.write(b"y")
    os._exit(71)
"""

#: Targets that take long.
SLOW = {"repeated", "video", "words", "advice"}

FOUND = sorted(path for path in CORPUS.glob("*/*"))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_mended(path: Path, tmp_path: Path) -> None:
    assert judge(TARGETS[path.parent.name].run, path.read_bytes(), tmp_path) is None


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"repeated"}))  # each of which is long
def test_every_reader_takes_what_fuzzing_starts_from(name: str, tmp_path: Path) -> None:
    """And a few mutations of it, the same ones each time."""
    target = TARGETS[name]
    for number, data in enumerate(target.seeds()):
        assert judge(target.run, data, tmp_path) is None
        changed = target.mutate(data, target.limit, number)
        assert judge(target.run, changed, tmp_path) is None


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - SLOW - {"spiece"}))
def test_readers_leave_nothing_on_the_heap(name: str, tmp_path: Path) -> None:
    """Not even the objects of an error.

    Those left out are slow, or `spiece`, as the suite keeps tokenizers; fuzzing measures all.
    """
    target = TARGETS[name]
    inputs = [target.mutate(data, target.limit, n) for n, data in enumerate(target.seeds()[:4])]
    assert leak(target.run, [*target.seeds()[:4], *inputs], tmp_path, passes=8) < MAX_LEAK


def test_what_an_execution_leaves_is_seen(tmp_path: Path) -> None:
    left: list[bytes] = []
    found = leak(lambda data, _: left.append(data + bytes(2000)), [b"x"] * 50, tmp_path, 4)
    assert found > MAX_LEAK


def test_what_ends_the_fuzzer_is_a_finding_too(tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text(FUZZER)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    made = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "strategy", "--findings", str(tmp_path / "found")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    record = json.loads(made.stdout)
    assert made.returncode == record["exit_code"] == 71, made.stderr
    assert record["findings"] == ["ZeroDivisionError-outside", "oom"]
    kept = {path.name.split("-")[0]: path.read_bytes() for path in tmp_path.glob("found/*/*")}
    assert kept == {"ZeroDivisionError": b"x", "oom": b"y"}
