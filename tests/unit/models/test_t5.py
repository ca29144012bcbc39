"""The text encoder's position buckets, configuration, keys and block seam."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.models.t5 import KEYS, T5Block, T5Config, T5Encoder, position_buckets

SMALL = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=2)


def test_position_buckets() -> None:
    """Exact to 7, doubling afterwards up to 128; keys after the query in the upper half."""
    buckets = position_buckets(300, buckets=32, max_distance=128)
    assert buckets.shape == (300, 300)
    to_past = [int(buckets[299, 299 - d]) for d in (0, 1, 7, 8, 15, 16, 32, 64, 127, 128, 299)]
    assert to_past == [0, 1, 7, 8, 9, 10, 12, 14, 15, 15, 15]
    to_future = [int(buckets[0, d]) for d in (1, 7, 8, 16, 32, 64, 299)]
    assert to_future == [17, 23, 24, 26, 28, 30, 31]


@pytest.mark.parametrize(
    "values",
    [
        {"feed_forward_proj": "relu"},
        {"d_model": "large"},
        {"d_model": None},
        {"num_heads": 2.5},
        {"relative_attention_num_buckets": 2},
        {"relative_attention_max_distance": 8},
    ],
)
def test_other_configurations_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match="config.json"):
        T5Config.from_dict(values)


def test_unknown_keys_and_whole_numbers_are_fine() -> None:
    config = T5Config.from_dict({"d_model": 8, "layer_norm_epsilon": 1, "torch_dtype": "float32"})
    assert config == T5Config(d_model=8, layer_norm_epsilon=1.0)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "lm_head.weight",
    ],
)
def test_duplicates_and_decoders_are_ignored(key: str) -> None:
    assert KEYS.find_parameter(key, (30, 16)) is None


class Counting:
    """Hands out blocks and notes in which order they come and go."""

    def __init__(self, blocks: list[T5Block]) -> None:
        self.blocks, self.log = blocks, list[str]()

    def get(self, index: int) -> T5Block:
        self.log.append(f"get {index}")
        return self.blocks[index]

    def release(self, index: int, output: mx.array) -> None:
        mx.eval(output)
        self.log.append(f"done {index}")


def test_blocks_come_from_the_provider() -> None:
    encoder = T5Encoder(SMALL)
    embeds = encoder.embed(mx.array([[3, 4, 1]]))
    provider = Counting(encoder.encoder.block)
    out = encoder(embeds, blocks=provider)
    assert provider.log == ["get 0", "done 0", "get 1", "done 1", "get 2", "done 2"]
    assert mx.array_equal(out, encoder(embeds))
