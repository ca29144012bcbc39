"""A folder with the published names, shapes and sizes, and nothing in them: holes take no room."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from mlx_sora.models.t5 import EMBEDDING_KEY
from tests.helpers.golden import DEFAULT_GOLDEN, Case
from tests.helpers.published import spiece_model

#: The keys of the published config.json files that mean something here.
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "model_type": "STDiT3",
        "depth": 28,
        "hidden_size": 1152,
        "num_heads": 16,
        "caption_channels": 4096,
        "model_max_length": 300,
        "pred_sigma": True,
        "qk_norm": True,
        "patch_size": [1, 2, 2],
    },
    "vae": {
        "model_type": "VideoAutoencoderPipeline",
        "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
        "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
        "micro_frame_size": 17,
        "shift": [-0.1, 0.34, 0.27, 0.98],
        "scale": [3.85, 2.32, 2.33, 3.06],
    },
    "text_encoder": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128},
}
MANIFESTS = {"transformer": "stdit3_xl2", "vae": "vae_v1_2", "text_encoder": "t5_xxl"}


def write_hollow(path: Path, shapes: dict[str, list[int]]) -> None:
    """A float32 safetensors file with these tensors; all of it behind the header is a hole."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 4 * prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        f.truncate(8 + len(raw) + offset)


def write_published(folder: Path) -> Path:
    """A folder laid out as the published model, T5 in two shards with the duplicate it carries."""
    for part, config in CONFIGS.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        manifest = Case(DEFAULT_GOLDEN / f"manifest_{MANIFESTS[part]}.json").config
        shapes = {key: shape for key, (shape, _) in manifest.items()}
        if part != "text_encoder":
            write_hollow(folder / part / "model.safetensors", shapes)
            continue
        shapes["encoder.embed_tokens.weight"] = shapes[EMBEDDING_KEY]
        keys, weight_map = list(shapes), {}
        for number, some in enumerate((keys[:100], keys[100:]), 1):
            name = f"model-{number:05}-of-00002.safetensors"
            write_hollow(folder / part / name, {key: shapes[key] for key in some})
            weight_map |= dict.fromkeys(some, name)
        index = folder / part / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece_model())
    return folder
