"""Loading of the networks of a model folder, lazily and strictly.

`load_*` fills a whole network. `stream_*` fills it except for its blocks, which the returned
`BlockSource` loads one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
from mlx import nn

from mlx_sora.errors import WeightsError
from mlx_sora.loading.blocks import BlockSource, split_blocks
from mlx_sora.loading.checkpoint import Checkpoint, Entry, load_weights, match_keys
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.quantization import (
    EMBEDDING,
    NetworkQuantization,
    TokenTable,
    insert_quantized_layers,
    quantizable_linears,
    quantize_on_load,
    table_form,
)
from mlx_sora.models import stdit3, t5, vae
from mlx_sora.models.key_map import KeyMap
from mlx_sora.models.quantized import Quantization
from mlx_sora.models.vae import VAEConfig, VideoVAE, key_map

#: Reads rows of the embedding table: token ids to [len(ids), D].
ReadRows = Callable[[Sequence[int]], mx.array]


def load_text_encoder(model: ModelFolder, dtype: mx.Dtype) -> tuple[t5.T5Encoder, ReadRows]:
    """Load T5 without its embedding table; also return a function that reads rows of it.

    The table of T5-XXL is 0.5 GB in float32, of which a prompt needs a few hundred kB.
    """
    network, checkpoint, table = _text_encoder(model)
    load_weights(network, checkpoint, t5.KEYS, dtype=dtype, skip_keys=table.keys)
    return network, table


def stream_text_encoder(
    model: ModelFolder, dtype: mx.Dtype
) -> tuple[t5.T5Encoder, ReadRows, BlockSource[t5.T5Block]]:
    """Load T5 as `load_text_encoder` does, with a source of its blocks."""
    network, checkpoint, table = _text_encoder(model)
    source = split_blocks(
        "text encoder",
        network,
        {(f"encoder.block.{i}.",): block for i, block in enumerate(network.encoder.block)},
        checkpoint,
        t5.KEYS,
        dtype=dtype,
        skip_keys=table.keys,
    )
    return network, table, source


def _text_encoder(model: ModelFolder) -> tuple[t5.T5Encoder, Checkpoint, TokenTable]:
    """Return T5 without weights and table of tokens, its checkpoint, and the table."""
    values = model.config("text_encoder")
    with _config_errors("text_encoder"):
        network = t5.T5Encoder(t5.T5Config.from_dict(values), embedding=False)
    checkpoint = model.checkpoint("text_encoder")
    stored, channels = NetworkQuantization.from_config(values), network.config.d_model
    rounding = dict(model.quantization).get("text_encoder") if stored is None else None
    table = TokenTable(checkpoint, *(table_form(q, channels) for q in (stored, rounding)))
    table.check(network.config.vocab_size, channels)
    return network, _quantize_network(model, "text_encoder", network, checkpoint), table


def load_transformer(model: ModelFolder, dtype: mx.Dtype) -> stdit3.STDiT3:
    """Load the denoising network."""
    network, checkpoint = _transformer(model, dtype)
    load_weights(network, checkpoint, stdit3.KEYS, dtype=dtype)
    return network


def stream_transformer(
    model: ModelFolder, dtype: mx.Dtype
) -> tuple[stdit3.STDiT3, BlockSource[stdit3.BlockPair]]:
    """Load the denoising network, with a source of its pairs of spatial and temporal blocks."""
    network, checkpoint = _transformer(model, dtype)
    pairs = zip(network.spatial_blocks, network.temporal_blocks, strict=True)
    source = split_blocks(
        "transformer",
        network,
        {(f"spatial_blocks.{i}.", f"temporal_blocks.{i}."): p for i, p in enumerate(pairs)},
        checkpoint,
        stdit3.KEYS,
        dtype=dtype,
    )
    return network, source


def _transformer(model: ModelFolder, dtype: mx.Dtype) -> tuple[stdit3.STDiT3, Checkpoint]:
    values = model.config("transformer")
    with _config_errors("transformer"):
        network = stdit3.STDiT3(stdit3.STDiT3Config.from_dict(values), dtype)
    checkpoint = model.checkpoint("transformer")
    _check_patch(network.config, checkpoint)
    return network, _quantize_network(model, "transformer", network, checkpoint)


def _check_patch(config: stdit3.STDiT3Config, checkpoint: Checkpoint) -> None:
    """Raise WeightsError unless the stored kernel of the patches has the configured size."""
    kernel = checkpoint.tensors.get(stdit3.PATCH_KEY)
    if kernel is not None and len(kernel.shape) == 5 and kernel.shape[2:] != config.patch_size:
        raise WeightsError(
            f"{kernel.file}: {stdit3.PATCH_KEY} has patches of {list(kernel.shape[2:])}, "
            f"expected {list(config.patch_size)}.",
            "The file and its config.json do not belong together.",
        )


def _quantize_network(
    model: ModelFolder, part: str, network: nn.Module, checkpoint: Checkpoint
) -> Checkpoint:
    """Quantize `network` as config.json or `model` requires; return the matching checkpoint."""
    quantization = NetworkQuantization.from_config(model.config(part))
    if quantization is None and part in dict(model.quantization):
        quantization = dict(model.quantization)[part]
        checkpoint = quantize_on_load(checkpoint, network, quantization)
    insert_quantized_layers(network, quantization)
    return checkpoint


def load_vae(
    model: ModelFolder, parts: Sequence[str] = ("decoder",), dtype: mx.Dtype = mx.float32
) -> VideoVAE:
    """Load the encoder, the decoder or both of the VAE. Its scale and shift stay float32."""
    network = _vae(model, parts, dtype)
    load_weights(network, model.checkpoint("vae"), key_map(parts), dtype=dtype)
    return network


def stream_decoder(
    model: ModelFolder, dtype: mx.Dtype = mx.float32
) -> tuple[VideoVAE, BlockSource[nn.Module]]:
    """Load the VAE's decoder, with a source of the layers of its temporal network."""
    network, path = _vae(model, ("decoder",), dtype), "temporal_vae.decoder"
    layers = network.temporal_vae.decoder.layers()
    source = split_blocks(
        "VAE",
        network,
        {(f"{path}.{name}.",): layer for name, layer in layers.items()},
        model.checkpoint("vae"),
        key_map(("decoder",)),
        dtype=dtype,
    )
    return network, source


def _vae(model: ModelFolder, parts: Sequence[str], dtype: mx.Dtype) -> VideoVAE:
    with _config_errors("vae"):
        return VideoVAE(VAEConfig.from_dict(model.config("vae")), parts, dtype)


@contextmanager
def _config_errors(part: str) -> Iterator[None]:
    """Raise WeightsError that names the config.json if the block cannot build its network."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise WeightsError(f"Cannot build a network from {part}/config.json: {error}.") from error


def match_part(model: ModelFolder, part: str, checkpoint: Checkpoint) -> list[Entry]:
    """Match all tensors of `part` to its network, T5's embedding table included.

    Reads config.json only. Raises WeightsError for an impossible configuration and for a checkpoint
    that does not match it.
    """
    network, keys = empty_network(model, part)
    if isinstance(network, stdit3.STDiT3):
        _check_patch(network.config, checkpoint)
    return match_keys(network, checkpoint, keys)


def quantizable_layers(
    model: ModelFolder, part: str, quantization: NetworkQuantization
) -> dict[str, Quantization]:
    """Return the forms of the layers of `part` to quantize, by path. Reads config.json only.

    T5's table of tokens is among them.
    """
    network, _ = empty_network(model, part)
    layers = quantizable_linears(network, quantization)
    forms = {path: form for path, (_, form) in layers.items()}
    if isinstance(network, t5.T5Encoder):
        table = table_form(quantization, network.config.d_model)
        forms |= {} if table is None else {EMBEDDING: table}
    return forms


def empty_network(model: ModelFolder, part: str) -> tuple[nn.Module, KeyMap]:
    """Return the whole network of `part` without weights, and its key map."""
    values = model.config(part)
    network: nn.Module
    with _config_errors(part):
        if part == "text_encoder":
            network, keys = t5.T5Encoder(t5.T5Config.from_dict(values)), t5.KEYS
        elif part == "transformer":
            network, keys = stdit3.STDiT3(stdit3.STDiT3Config.from_dict(values)), stdit3.KEYS
        else:
            network, keys = vae.VideoVAE(VAEConfig.from_dict(values)), vae.KEYS
    insert_quantized_layers(network, NetworkQuantization.from_config(values))
    return network, keys
