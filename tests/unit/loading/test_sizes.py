"""Sizes from headers against the networks they describe."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_text_encoder, load_transformer
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.models.precision import Precision
from mlx_sora.models.vae import VAEConfig, VideoVAE
from tests.helpers import networks

VAE = {
    "spatial_config": {"block_out_channels": [8, 8], "norm_num_groups": 4},
    "temporal_config": {"filters": 8, "num_res_blocks": 1, "num_groups": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Stored in half precision; the VAE has its encoder, too."""
    root = tmp_path_factory.mktemp("model")
    networks.t5_model(root, dtype=mx.float16)
    vae = VideoVAE(VAEConfig.from_dict(VAE))
    weights = {}
    for path, value in networks.random_weights(vae, 5).items():
        name = path.replace("spatial_vae.", "spatial_vae.module.")
        weights[name] = value.transpose(2, 3, 0, 1) if value.ndim == 4 else value
        if path.startswith("temporal_vae."):
            stem, leaf = path.rsplit(".", 1)
            kernel = {2: value[..., None, None, None], 5: None}.get(value.ndim, value)
            kernel = value.transpose(3, 4, 0, 1, 2) if kernel is None else kernel
            wrapped = "norm" not in path
            del weights[name]
            weights[f"{stem}.conv.{leaf}" if wrapped else path] = kernel
    networks.save(root / "vae", VAE, weights)
    return networks.stdit_model(root, dtype=mx.float16)


def bytes_of(network: nn.Module) -> int:
    return sum(value.nbytes for value in networks.leaves(network).values())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_sizes(model: ModelFolder, dtype: mx.Dtype) -> None:
    before = mx.get_active_memory()
    sizes = model_sizes(model, Precision(dtype, dtype))
    assert mx.get_active_memory() - before < 1 << 16
    text, _ = load_text_encoder(model, dtype)
    transformer = load_transformer(model, dtype)
    for network, weights, depth in (
        (text, sizes.text_weights, 5),
        (transformer, sizes.transformer_weights, 5),
    ):
        assert weights.total == bytes_of(network)
        # Rotary frequencies are float32 in memory, whatever the type of the run.
        constants = networks.STDIT.head_dim // 2 if network is transformer else 0
        values = (weights.total - constants * mx.float32.size) // dtype.size + constants
        assert weights.stored == values * mx.float16.size
        assert len(weights.blocks) == depth
        assert (weights.load_peak_bytes == max(weights.blocks)) == (dtype == mx.float16)
    vae = VideoVAE(VAEConfig.from_dict(VAE), ("decoder",))
    assert sizes.vae_decoder.temporal == bytes_of(vae.temporal_vae)
    assert sizes.vae_decoder.spatial == bytes_of(vae.spatial_vae)
    assert sizes.vae_decoder.stored == bytes_of(vae)
    assert sizes.vae == vae.config


def test_a_checkpoint_of_another_configuration(model: ModelFolder, tmp_path: Path) -> None:
    networks.t5_model(tmp_path)
    networks.stdit_model(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"depth": 6}))
    with pytest.raises(WeightsError, match=r"missing tensor spatial_blocks\.5"):
        model_sizes(ModelFolder(tmp_path, "test", model.defaults), Precision())
