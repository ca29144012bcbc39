"""Building each network of a model folder and filling it, lazily and strictly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint, fill
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.models import stdit3, t5
from mlx_sora.models.vae import VAEConfig, VideoVAE, keys_for

#: Token ids to rows of the embedding table, [len(ids), D].
ReadRows = Callable[[Sequence[int]], mx.array]


def load_text_encoder(model: ModelFolder, dtype: mx.Dtype) -> tuple[t5.T5Encoder, ReadRows]:
    """T5 without its embedding table, and a function that reads single rows of it from disk.

    The table of T5-XXL is 0.5 GB in float32, of which a prompt needs a few hundred kB.
    """
    config = t5.T5Config.from_dict(model.config("text_encoder"))
    checkpoint = Checkpoint.open(model.text_encoder)
    table = checkpoint.tensors.get(t5.TABLE)
    expected = (config.vocab_size, config.d_model)
    if table is None or table.shape != expected:
        found = "missing" if table is None else f"of shape {list(table.shape)}"
        raise WeightsError(
            f"{model.text_encoder}: {t5.TABLE} is {found}, expected {list(expected)}.",
            "The file and its config.json do not belong together.",
        )
    network = t5.T5Encoder(config, table=False)
    fill(network, checkpoint, t5.KEYS, dtype=dtype, without=[t5.TABLE])
    return network, partial(checkpoint.rows, t5.TABLE)


def load_transformer(model: ModelFolder, dtype: mx.Dtype) -> stdit3.STDiT3:
    """The denoising network."""
    network = stdit3.STDiT3(stdit3.STDiT3Config.from_dict(model.config("transformer")))
    fill(network, Checkpoint.open(model.transformer), stdit3.KEYS, dtype=dtype)
    return network


def load_vae(model: ModelFolder, parts: Sequence[str] = ("decoder",)) -> VideoVAE:
    """The VAE, or the halves of it that are needed; always float32, as the reference keeps it."""
    network = VideoVAE(VAEConfig.from_dict(model.config("vae")), parts)
    fill(network, Checkpoint.open(model.vae), keys_for(parts), dtype=mx.float32)
    return network
