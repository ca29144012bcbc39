"""T5's tokenizer: text to ids with an end-of-sequence token, truncated to the training length.

The vocabulary comes from `spiece.model` through sentencepiece. Normalization (normalizer.py) and
segmentation are done here, because the reference uses the `tokenizers` library, which differs from
sentencepiece: special tokens written in a text count as such, and scores are added per word in
double precision, which decides ties ("AAAA...").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_sora.errors import WeightsError
from mlx_sora.text.normalizer import Normalizer
from mlx_sora.utils.json import read_bytes

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_LENGTH = 300
PAD, EOS, UNK = 0, 1, 2
#: T5's sentinel tokens are not in `spiece.model`; they follow its pieces, the highest number first.
EXTRA_IDS = 100

#: Bytes of a tokenizer model, and characters of a piece of it; T5's has 0.8 MB, and 16.
MAX_MODEL, MAX_PIECE = 8_000_000, 256

#: Number of ids of the published T5, and checksum of its pieces, scores and normalization.
PUBLISHED_IDS = 32100
PUBLISHED_DIGEST = "79ee3fdc5afe55f4b1dd8da7e6bb3ad7e709217b46e7a607324161f1673a8e41"

_SPECIAL = re.compile(r"(</s>|<pad>|<unk>|<extra_id_(?:[1-9]?\d)>)")
_SPACE = "\u2581"
_WORD = re.compile(f"{_SPACE}[^{_SPACE}]*")
_UNKNOWN_PENALTY = 10.0


@dataclass(frozen=True)
class Encoding:
    """Token ids with the end-of-sequence token; `cut` is the text that did not fit."""

    ids: tuple[int, ...]
    cut: str = ""
    num_cut: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warning that the end of the prompt was cut, if it was."""
        if not self.num_cut:
            return ()
        cut = self.cut if len(self.cut) <= 80 else self.cut[:77] + "..."
        return (
            f"The prompt is longer than {len(self.ids)} tokens: "
            f"its last {self.num_cut} were cut ({cut!r}).",
        )


class Tokenizer:
    """Unigram tokenizer of T5 v1.1."""

    def __init__(self, model: SentencePieceProcessor, normalizer: Normalizer) -> None:
        self._model, self._normalizer = model, normalizer
        size = model.vocab_size()
        self._pieces = {model.id_to_piece(i): (i, model.get_score(i)) for i in range(size)}
        self._unknown_score = min(score for _, score in self._pieces.values()) - _UNKNOWN_PENALTY
        self._specials = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK}
        for number in range(EXTRA_IDS):
            self._specials[f"<extra_id_{number}>"] = size + EXTRA_IDS - 1 - number
        # Text that only normalises to a special token ("＜pad＞") is one too, with the best score.
        self._pieces |= {name: (i, 0.0) for name, i in self._specials.items()}
        self._max_piece_length = max(map(len, self._pieces))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a `spiece.model` file. Raises WeightsError if it is missing or not T5's."""
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        fix = "Put T5's spiece.model there."
        try:
            proto = read_bytes(path, MAX_MODEL)
            model = SentencePieceProcessor(model_proto=proto)
            tokenizer = cls(model, Normalizer(proto))  # raises where pieces are not UTF-8
        except OSError as error:
            reason = error.strerror or "cannot be read"
            raise WeightsError(f"Tokenizer model {path}: {reason}.", fix) from error
        except (RuntimeError, ValueError) as error:
            reason = str(error) if "Git LFS" in str(error) else "it is not a SentencePiece model"
            raise WeightsError(f"Cannot read {path}: {reason}.", fix) from error
        found = (model.pad_id(), model.eos_id(), model.unk_id())
        if found != (PAD, EOS, UNK):
            raise WeightsError(
                f"{path} is not T5's: pad, eos, unk are {found}, expected {(PAD, EOS, UNK)}.", fix
            )
        if tokenizer._max_piece_length > MAX_PIECE:
            raise WeightsError(f"{path} is not T5's: a piece has over {MAX_PIECE} characters.", fix)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, sentinels included. T5's embedding table has more rows."""
        return self._model.vocab_size() + EXTRA_IDS

    @property
    def is_published(self) -> bool:
        """True if pieces, scores and normalization are those of every published T5."""
        model = self._model
        rows = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
        content = repr((self._normalizer.digest, rows)).encode()
        return hashlib.sha256(content).hexdigest() == PUBLISHED_DIGEST

    def encode(self, text: str, max_length: int = MAX_LENGTH) -> Encoding:
        """Tokenize `text` to at most `max_length` ids, the end-of-sequence token included."""
        tokens = list(self._tokens(text))
        kept, cut = tokens[: max_length - 1], tokens[max_length - 1 :]
        surface = "".join(piece for _, piece in cut).replace(_SPACE, " ").strip()
        return Encoding((*(i for i, _ in kept), EOS), surface, len(cut))

    def knows(self, text: str) -> bool:
        """Return True if `text` has a token that is neither unknown nor a space."""
        return any(i != UNK and piece != _SPACE for i, piece in self._tokens(text))

    def _tokens(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield (id, surface) of each token; the first surface of a word has a space mark."""
        # A lone surrogate, from bytes that were not UTF-8, has no encoding.
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        for part in _SPECIAL.split(text):
            if part in self._specials:
                yield self._specials[part], part
            else:
                # Each word begins with a mark. A mark in the text begins one too.
                for word in self._normalizer.normalize(part).split():
                    for piece in _WORD.findall(_SPACE + word.removeprefix(_SPACE)):
                        yield from self._segment(piece)

    def _segment(self, word: str) -> list[tuple[int, str]]:
        """Split a word into its most probable pieces (Viterbi), with adjacent unknowns merged."""
        best = [0.0, *[float("-inf")] * len(word)]
        arrivals = [(0, UNK)] * (len(word) + 1)
        for start in range(len(word)):
            score_here = best[start]
            for end in range(start + 1, min(start + self._max_piece_length, len(word)) + 1):
                entry = self._pieces.get(word[start:end])
                if entry is None and end == start + 1:
                    entry = (UNK, self._unknown_score)
                if entry is not None and score_here + entry[1] > best[end]:
                    best[end], arrivals[end] = score_here + entry[1], (start, entry[0])
        tokens: list[tuple[int, str]] = []
        end = len(word)
        while end:
            start, token = arrivals[end]
            if token == UNK and tokens and tokens[-1][0] == UNK:
                tokens[-1] = (UNK, word[start:end] + tokens[-1][1])
            else:
                tokens.append((token, word[start:end]))
            end = start
        return tokens[::-1]
