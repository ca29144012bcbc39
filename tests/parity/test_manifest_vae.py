"""The full-size VAE against the list of tensors in its published checkpoint."""

from __future__ import annotations

import pytest

from mlx_sora.models.vae import KEYS, VAEConfig, VideoVAE, key_map
from mlx_sora.models.vae_spatial import NETWORKS
from tests.helpers.golden import Case
from tests.helpers.manifest import check_manifest, nothing_allocated

HALF = {"encoder": (".encoder.", ".quant_conv."), "decoder": (".decoder.", ".post_quant_conv.")}


@pytest.mark.golden("manifest_vae")
def test_every_tensor_has_its_parameter(case: Case) -> None:
    with nothing_allocated():
        vae = VideoVAE(VAEConfig.from_dict({}))
        check_manifest(vae, KEYS, case.config)


@pytest.mark.golden("manifest_vae")
@pytest.mark.parametrize("part", NETWORKS)
def test_one_half_takes_its_tensors_and_ignores_the_other(case: Case, part: str) -> None:
    keys = key_map((part,))
    other = next(p for p in NETWORKS if p != part)
    foreign = {k for k in case.config if any(name in k for name in HALF[other])}
    assert foreign == {
        k for k, (shape, _) in case.config.items() if not keys.find_parameter(k, tuple(shape))
    }
    with nothing_allocated():
        vae = VideoVAE(VAEConfig.from_dict({}), (part,))
        check_manifest(vae, keys, {k: v for k, v in case.config.items() if k not in foreign})


@pytest.mark.golden("manifest_vae")
def test_older_names_of_attention_fill_the_same_parameters(case: Case) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, (shape, dtype) in case.config.items():
        for new, older in names.items():
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{older}.")
                # Published in both forms: matrices, and 1x1 convolutions.
                shape = [*shape, 1, 1] if key.endswith("weight") and new != "to_v" else shape
        old[key] = [shape, dtype]
    assert sum(".query." in key for key in old) == 4
    check_manifest(VideoVAE(VAEConfig.from_dict({})), KEYS, old)
