"""The T5 encoder against the reference, at every position, padded ones too."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models.hooks import ResidentBlocks
from mlx_sora.models.t5 import KEYS, T5Block, T5Config, T5Encoder
from tests.helpers.golden import Case, relative_error
from tests.helpers.tolerance import rounding

TOLERANCE = rounding(1e-4)


def load(case: Case) -> T5Encoder:
    encoder = T5Encoder(T5Config.from_dict(case.config["constructor"]))
    load_weights(encoder, case.weights, KEYS)
    return encoder


@pytest.mark.golden("t5")
def test_every_position(case: Case) -> None:
    encoder = load(case)
    out = encoder(encoder.embed(case["in.input_ids"]), case["in.attention_mask"])
    assert relative_error(out, case["out.last_hidden_state"]) <= TOLERANCE


@pytest.mark.golden("t5")
def test_intermediates(case: Case) -> None:
    encoder = load(case)
    embeds = encoder.embed(case["in.input_ids"])
    actual = dict[str, mx.array]()

    class Recording(ResidentBlocks[T5Block]):
        def release(self, index: int, output: mx.array) -> None:
            actual[f"out.hidden.{index + 1}"] = output

    encoder(embeds, case["in.attention_mask"], Recording(encoder.encoder.block))
    actual["out.hidden.0"] = actual["out.embed"] = embeds
    actual["out.position_bias"] = encoder.encoder.block[0].position_bias(embeds.shape[1])
    compared = [name for name in actual if case.get(name) is not None]
    assert "out.embed" in compared
    for name in compared:
        assert relative_error(actual[name], case[name]) <= TOLERANCE, name


@pytest.mark.golden("t5")
def test_padding_is_not_needed(case: Case) -> None:
    """A prompt encoded alone, without padding or mask, has the states it has in a batch."""
    encoder = load(case)
    for ids, mask, padded in zip(
        case["in.input_ids"],
        case["in.attention_mask"],
        case["out.last_hidden_state"],
        strict=True,
    ):
        length = int(mask.sum())
        out = encoder(encoder.embed(ids[None, :length]))
        assert relative_error(out[0], padded[:length]) <= TOLERANCE


@pytest.mark.golden("t5")
def test_rows_from_outside(case: Case) -> None:
    """Without a resident table, from the rows of the tokens at hand: the very same states."""
    whole = load(case)
    lean = T5Encoder(T5Config.from_dict(case.config["constructor"]), embedding=False)
    weights = {k: v for k, v in case.weights.items() if k != "shared.weight"}
    load_weights(lean, weights, KEYS)
    ids, mask = case["in.input_ids"], case["in.attention_mask"]
    rows = sorted(set(ids.flatten().tolist()))
    table = case.weights["shared.weight"][mx.array(rows)]
    embeds = table[mx.array([[rows.index(i) for i in line] for line in ids.tolist()])]
    assert mx.array_equal(lean(embeds, mask), whole(whole.embed(ids), mask))
