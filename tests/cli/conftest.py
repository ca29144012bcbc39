"""The command line in an empty folder, with a pipeline that needs no model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sora.cli import generate, info
from tests.helpers.fake_pipeline import FakePipeline


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """The fake in place of the real pipeline."""
    fake = FakePipeline()
    monkeypatch.setattr(generate, "load_pipeline", fake.load)
    monkeypatch.setattr(info, "load_pipeline", fake.load)
    monkeypatch.setattr(generate, "environment_notice", lambda: "a notice")
    return fake
