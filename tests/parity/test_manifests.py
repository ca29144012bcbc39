"""The full-size T5 and STDiT3: every checkpoint key has its place, without allocating weights."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_sora.models import t5
from tests.parity.golden import Case
from tests.parity.manifest import check_manifest, nothing_allocated


@pytest.mark.golden("manifest_t5")
def test_t5(case: Case) -> None:
    manifest: dict[str, Any] = case.config
    with nothing_allocated():
        encoder = t5.T5Encoder(t5.T5Config())
        check_manifest(encoder, t5.KEYS, manifest)
