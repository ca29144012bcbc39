"""Tiny random models under the published names: the repositories that the fake hub serves.

Configurations and weights come from the committed golden cases; the tokenizer is trained on a few
words, because no case holds one.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.manage.sources import SOURCES
from tests.helpers.golden import DEFAULT_GOLDEN, Case
from tests.helpers.hub_server import Repo

STDIT, VAE, PIXART = (source.repo for source in SOURCES[:3])
VOCABULARY = 60
ROWS = 256


@cache
def repositories() -> dict[str, dict[str, bytes]]:
    """Repository to files: one checkpoint each, but T5, which is in two shards with an index."""
    return {
        STDIT: _single(*_transformer()),
        VAE: _single(*_vae()),
        PIXART: {
            **{f"text_encoder/{name}": data for name, data in _sharded(*_text_encoder()).items()},
            "tokenizer/spiece.model": spiece_model(),
            "tokenizer/tokenizer_config.json": b"{}",
            "vae/config.json": b"{}",
            "vae/diffusion_pytorch_model.safetensors": b"not asked for",
        },
    }


def repos() -> dict[str, Repo]:
    """Fresh repositories with these files."""
    return {name: Repo(dict(files)) for name, files in repositories().items()}


def write_model(folder: Path) -> Path:
    """The model as a folder, laid out as after a download but without provenance."""
    for source in SOURCES:
        (folder / source.part).mkdir(parents=True)
        start = f"{source.folder}/" if source.folder else ""
        for name, data in repositories()[source.repo].items():
            wanted = name.startswith(start) and not name.endswith((".md", "tokenizer_config.json"))
            if wanted and "/" not in name.removeprefix(start):
                (folder / source.part / name.removeprefix(start)).write_bytes(data)
    return folder


@cache
def spiece_model() -> bytes:
    """A SentencePiece model with T5's special tokens and a vocabulary of 60."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moving right on a black background"] * 4),
        model_writer=out,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


def _transformer() -> tuple[dict[str, Any], dict[str, mx.array]]:
    case = Case(DEFAULT_GOLDEN / "stdit3_c_image.safetensors")
    return case.config["constructor"] | {"model_type": "STDiT3"}, case.weights


def _vae() -> tuple[dict[str, Any], dict[str, mx.array]]:
    case = Case(DEFAULT_GOLDEN / "vae_pipeline_decode.safetensors")
    given = case.config["constructor"]
    config = {"vae_2d": {"micro_batch_size": 4}, "micro_frame_size": 17}
    config |= {"shift": given["shift"], "scale": given["scale"]}
    config |= {"spatial_config": given["spatial"], "temporal_config": given["temporal"]}
    return config, case.weights


def _text_encoder() -> tuple[dict[str, Any], dict[str, mx.array]]:
    case = Case(DEFAULT_GOLDEN / "t5_pad40.safetensors")
    config = case.config["constructor"] | {"vocab_size": ROWS}
    table = mx.random.normal((ROWS, config["d_model"]), key=mx.random.key(0))
    return config, dict(case.weights) | {"shared.weight": table}


def _single(config: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, bytes]:
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# A model\n",
        "config.json": json.dumps(config).encode(),
        "model.safetensors": _safetensors(weights),
    }


def _sharded(config: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, bytes]:
    names = sorted(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    files = {"config.json": json.dumps(config).encode()}
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        files[shard] = _safetensors({name: weights[name] for name in half})
        weight_map |= dict.fromkeys(half, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def _safetensors(weights: dict[str, mx.array]) -> bytes:
    out = io.BytesIO()
    mx.save_safetensors(out, weights)
    return out.getvalue()
