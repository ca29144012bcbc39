"""Prompts to text states: tokenizer, embedding rows, T5, one prompt at a time and never padded.

T5 masks padding and the transformer drops it, so leaving it out changes nothing and saves up to
300 tokens' work per prompt (tests/invariants/test_exact_savings.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.models.hooks import BlockProvider
from mlx_sora.models.t5 import T5Block, T5Encoder
from mlx_sora.text.tokenizer import MAX_LENGTH, Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextStates:
    """T5's view of one cleaned prompt: float states [n, D]; `warnings` says what was cut."""

    states: mx.array
    warnings: tuple[str, ...] = ()


class TextEncoder:
    """T5 with its tokenizer; `rows` reads embedding rows [n, D] for token ids.

    blocks: where T5's blocks come from; None means that they are in memory.
    """

    def __init__(
        self,
        network: T5Encoder,
        rows: Callable[[Sequence[int]], mx.array],
        tokenizer: Tokenizer,
        dtype: mx.Dtype,
        blocks: BlockProvider[T5Block] | None = None,
    ) -> None:
        self._network = network
        self._rows = rows
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._blocks = blocks

    def encode(self, text: str, max_length: int = MAX_LENGTH) -> TextStates:
        """Text states of one cleaned prompt, evaluated; prompts beyond `max_length` are cut."""
        encoding = self._tokenizer.encode(text, max_length)
        log.debug("prompt has %d tokens", len(encoding.ids))
        embeddings = self._rows(encoding.ids)[None].astype(self._dtype)
        states = self._network(embeddings, blocks=self._blocks)[0]
        mx.eval(states)
        if not encoding.num_cut:
            return TextStates(states)
        cut = encoding.cut if len(encoding.cut) <= 80 else encoding.cut[:77] + "..."
        return TextStates(
            states,
            (
                f"The prompt is longer than {max_length} tokens: "
                f"its last {encoding.num_cut} were cut ({cut!r}).",
            ),
        )
