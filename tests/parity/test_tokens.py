"""Token ids against the reference: exact."""

from __future__ import annotations

import pytest

from mlx_sora.text.tokenizer import PAD, Tokenizer
from tests.helpers.golden import Case
from tests.helpers.tokenizer_model import spiece_model

UNCUT = 10**9


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(spiece_model(request.config.getoption("--golden")))


@pytest.mark.golden("tokens")
def test_ids(case: Case, tokenizer: Tokenizer) -> None:
    for text, ids in case.config.items():
        assert list(tokenizer.encode(text, UNCUT).ids) == ids, text


@pytest.mark.golden("tokens_padded")
def test_padding_and_truncation(case: Case, tokenizer: Tokenizer) -> None:
    length = case.config["max_length"]
    for row in case.config["rows"]:
        encoding = tokenizer.encode(row["text"], length)
        count, missing = len(encoding.ids), length - len(encoding.ids)
        assert row["input_ids"] == [*encoding.ids, *[PAD] * missing], row["text"]
        assert row["attention_mask"] == [1] * count + [0] * missing, row["text"]
        assert len(encoding.ids) + encoding.num_cut == row["n_tokens_untruncated"], row["text"]


@pytest.mark.golden("tokens_special")
def test_special_tokens_and_ties_follow_tokenizers(case: Case, tokenizer: Tokenizer) -> None:
    for row in case.config["rows"]:
        assert list(tokenizer.encode(row["text"], UNCUT).ids) == row["tokenizers"], row["text"]
