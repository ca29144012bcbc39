"""The tokenizer's own promises; ids are held to the reference by the parity tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.text.tokenizer import EOS, Tokenizer
from tests.helpers.tokenizer_model import spiece_model


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(spiece_model(request.config.getoption("--golden")))


def test_empty_text_is_the_end_alone(tokenizer: Tokenizer) -> None:
    for text in ("", "  \n"):
        assert tokenizer.encode(text).ids == (EOS,)


def test_what_does_not_fit_is_told(tokenizer: Tokenizer) -> None:
    words = ["circle"] * 200 + ["square"] * 200
    whole = tokenizer.encode(" ".join(words), 10**6)
    cut = tokenizer.encode(" ".join(words))
    assert len(cut.ids) == 300
    assert cut.ids[-1] == EOS
    assert cut.ids[:-1] == whole.ids[:299]
    assert cut.num_cut == len(whole.ids) - 300
    assert cut.cut.endswith("square square")
    assert whole.cut == ""
    assert whole.num_cut == 0


def test_text_that_just_fits_is_not_cut(tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode("a red circle moving right").ids)
    assert tokenizer.encode("a red circle moving right", length).cut == ""
    assert tokenizer.encode("a red circle moving right", length - 1).cut == "right"


def test_vocabulary_holds_the_sentinels(tokenizer: Tokenizer) -> None:
    first, last = (tokenizer.encode(f"<extra_id_{n}>").ids[0] for n in (0, 99))
    assert first == tokenizer.vocab_size - 1
    assert last == tokenizer.vocab_size - 100


def test_bytes_that_were_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a \udcff b").ids == tokenizer.encode("a \ufffd b").ids


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_missing_and_wrong_models(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"spiece\.model"):
        Tokenizer.load(path)
