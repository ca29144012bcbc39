"""Every input that once broke a reader, and every input that fuzzing starts from, again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import CORPUS
from tests.fuzz.targets import TARGETS
from tests.fuzz.verdict import judge

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
