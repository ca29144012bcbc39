"""A language model that mlx-lm can load: a random llama of one layer whose tokens are letters."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

WIDTH = 16


def write_language_model(folder: Path) -> Path:
    letters = ["<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    fuse = {"type": "Fuse"}
    split = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": split,
        "decoder": fuse,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(letters),
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    contents = {"tokenizer": tokenizer, "tokenizer_config": names, "config": config}
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (len(letters), WIDTH), f"{layer}mlp.down_proj": (WIDTH, 32)}
    shapes |= {f"{layer}self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj": (32, WIDTH) for name in ("gate", "up")}
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    keys = mx.random.split(mx.random.key(0), len(shapes))
    weights = {
        f"{name}.weight": 0.3 * mx.random.normal(shape, key=key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    weights |= {f"{name}.weight": mx.ones(WIDTH) for name in norms}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder
