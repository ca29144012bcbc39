"""Stacked combining marks: tokens equal those of `tokenizers`.

Reports: huggingface/tokenizers #2116 and #2334.

The ids are those of `tokenizers` 0.23.3 with T5's tokenizer.json. sentencepiece has others.
"""

from __future__ import annotations

import pytest

from mlx_sora.text.normalizer import grapheme_clusters
from mlx_sora.text.tokenizer import Tokenizer
from tests.helpers.tokenizer_model import spiece_model

IDS = {
    # Clusters of less than six bytes: the shortest known prefix, and what follows is lost.
    "a\u0301b": [3, 2975, 115, 1],
    "e\u0302\u0323x": [3, 8202, 226, 1],
    "\ufb01\u0301t": [1400, 1],
    "\u00aa\u0903a": [3, 9, 9, 1],
    # Longer ones: each character for itself, so nothing is composed.
    "a\u0301\u0302\u0303b": [3, 9, 2, 115, 1],
    "e\u0301\u0323\u0308x": [3, 15, 2, 226, 1],
    "\u0600e\u0301": [3, 2, 15, 2, 1],
    "Z\u0351\u036b\u0343a\u0321l\u0358g\u0361o": [1027, 2, 9, 2, 40, 2, 122, 2, 32, 1],
    "tie\u0302\u0301ng vie\u0323\u0302t": [3, 17, 23, 8202, 1725, 5931, 2, 17, 1],
    "\u2460\u0301\u0302": [209, 2, 1],
    # Clusters end at control characters and at marks that do not extend.
    "\u00ad\u0301a": [3, 575, 2, 9, 1],
    "\u00aa\u1038a": [3, 9, 2, 9, 1],
    "\r\na": [3, 9, 1],
    "\u0301a": [3, 2, 9, 1],
    "\x00a": [3, 2, 9, 1],
    # Joined emoji, halfwidth voicing marks, T5's own mark.
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 walk": [3, 2, 3, 2, 3, 2, 1482, 1],
    "\uff76\uff9e": [3, 2, 1],
    "x\u2581\u2581y": [3, 226, 3, 63, 1],
    "\u2581": [1],
}


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(spiece_model(request.config.getoption("--golden")))


@pytest.mark.parametrize("text", IDS, ids=ascii)
def test_ids_are_those_of_tokenizers(text: str, tokenizer: Tokenizer) -> None:
    assert list(tokenizer.encode(text).ids) == IDS[text]


def test_clusters() -> None:
    text = "e\u0301\u0323a\r\n\u0301\u0600b\u0e33\u1038"
    found = ["e\u0301\u0323", "a", "\r\n", "\u0301", "\u0600b\u0e33", "\u1038"]
    assert list(grapheme_clusters(text)) == found
    assert list(grapheme_clusters("")) == []
