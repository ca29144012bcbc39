"""Prompts to T5 states: embedding rows and T5, one prompt at a time and never padded.

T5 masks padding and the transformer drops it, so leaving it out changes nothing and saves up to
300 tokens' work per prompt (tests/invariants/test_exact_savings.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_sora.models.hooks import BlockProvider
from mlx_sora.models.t5 import T5Block, T5Encoder
from mlx_sora.text.tokenizer import Encoding

log = logging.getLogger(__name__)


class TextEncoder:
    """T5; `rows` reads embedding rows [n, D] for token ids.

    blocks: provider of T5's blocks; None if they are resident.
    """

    def __init__(
        self,
        network: T5Encoder,
        read_embeddings: Callable[[Sequence[int]], mx.array],
        dtype: mx.Dtype,
        blocks: BlockProvider[T5Block] | None = None,
    ) -> None:
        self._network, self._read_embeddings = network, read_embeddings
        self._dtype, self._blocks = dtype, blocks

    def encode(self, encoding: Encoding) -> mx.array:
        """Return the states [n, D] of one tokenized prompt, evaluated."""
        log.debug("prompt has %d tokens", len(encoding.ids))
        embeddings = self._read_embeddings(encoding.ids)[None].astype(self._dtype)
        states = self._network(embeddings, blocks=self._blocks)[0]
        mx.eval(states)
        return states
