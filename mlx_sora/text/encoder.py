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

log = logging.getLogger(__name__)


def encode_tokens(
    network: T5Encoder,
    read_embeddings: Callable[[Sequence[int]], mx.array],
    ids: Sequence[int],
    dtype: mx.Dtype,
    blocks: BlockProvider[T5Block] | None = None,
) -> mx.array:
    """Return T5's states [n, D] of the n token ids of one prompt, evaluated.

    Args:
        read_embeddings: token ids to rows [n, D] of the embedding table.
        blocks: provider of T5's blocks; None if they are resident.
    """
    log.debug("prompt has %d tokens", len(ids))
    states = network(read_embeddings(ids)[None].astype(dtype), blocks=blocks)[0]
    mx.eval(states)
    return states
