"""The published shapes: 25 GB of files that take no room, because there is nothing in them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.manage.doctor import diagnose
from tests.helpers.full_size import write_published


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path)


def test_the_published_shapes_fit_without_reading_a_weight(published: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = [f for f in diagnose(published, quick=True) if f.subject != "machine"]
    assert {f.level for f in found} == {"ok", "note"}, found
    assert mx.get_peak_memory() - before < 1 << 20
    sizes = {f.subject: f.message for f in found if "fits" in f.message}
    assert "4,893,906,944 values" in sizes["text_encoder"]
    assert "1,208,872,772 values" in sizes["transformer"]
    assert "393,341,015 values" in sizes["vae"]
