"""The full-size T5 and STDiT3: every checkpoint key has its place, without allocating weights."""

from __future__ import annotations

from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlx_sora.models import stdit3, t5
from tests.helpers.golden import Case
from tests.helpers.manifest import check_manifest, nothing_allocated


@pytest.mark.golden("manifest_t5")
def test_t5(case: Case) -> None:
    manifest: dict[str, Any] = case.config
    with nothing_allocated():
        encoder = t5.T5Encoder(t5.T5Config())
        check_manifest(encoder, t5.KEYS, manifest)


@pytest.mark.golden("manifest_stdit3")
@pytest.mark.parametrize("rope", [True, False], ids=["rope stored", "rope absent"])
def test_stdit3(case: Case, rope: bool) -> None:
    manifest = {k: v for k, v in case.config.items() if rope or k != "rope.freqs"}
    with nothing_allocated():
        model = stdit3.STDiT3(stdit3.STDiT3Config())
        check_manifest(model, stdit3.KEYS, manifest)


def test_stdit3_3b() -> None:
    """What a config.json of the 3B/2 says builds, without allocating, to its size."""
    config = stdit3.STDiT3Config.from_dict({"hidden_size": 1872, "num_heads": 26})
    with nothing_allocated():
        model = stdit3.STDiT3(config)
        elements = sum(value.size for _, value in tree_flatten(model.parameters()))
    assert 3.1e9 < elements < 3.3e9
