"""What each exact saving is worth: the same result with and without it, runs alternating.

    python -m benchmarks.savings [--runs 9] [--json FILE]

Layers have the published widths (T5 that of the large encoder), but there are few of them and few
tokens, so that a run takes a fraction of a second. Exits with 1 if a saving changes its result:
tests/invariants/test_exact_savings.py is the proof, this is the price list.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)
from benchmarks.studies import Study, evaluated, normal, report

import mlx.core as mx  # isort: skip

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.memory.limits import release
from mlx_sora.models import conv, t5
from mlx_sora.models.stdit3 import Conditions, STDiT3, STDiT3Config, position_embedding

#: Tokens of a usual prompt, what the reference pads it to, and steps of a usual run.
PROMPT, PADDED, STEPS = 20, 300, 30

#: Latent frames, height and width of the small video: 2 x 64 tokens.
GRID = (2, 16, 16)


def text_encoder() -> Iterator[Study]:
    config = t5.T5Config(d_model=1024, d_ff=2816, num_heads=16, num_layers=1)
    encoder = t5.T5Encoder(config, embedding=False)
    mx.eval(encoder.parameters())
    padded, mask = normal(1, PADDED, config.d_model), (mx.arange(PADDED) < PROMPT)[None]
    prompt = evaluated(padded[:, :PROMPT])
    yield Study(
        "prompt not padded: T5",
        f"1 block, width {config.d_model}; {PROMPT} tokens, not {PADDED}",
        lambda: evaluated(encoder(padded, mask)[:, :PROMPT]),
        lambda: evaluated(encoder(prompt)),
    )


def embedding_table() -> Iterator[Study]:
    import numpy as np

    config = t5.T5Config()
    # A pattern whose length no row divides, so that rows differ.
    pattern = np.random.default_rng(0).standard_normal((1 << 20) + 7).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.safetensors"
        table = np.resize(pattern, (config.vocab_size, config.d_model))
        mx.save_safetensors(str(file), {t5.EMBEDDING_KEY: mx.array(table)})
        del table
        checkpoint = Checkpoint.open(file)
        ids = [(97 * i * i + 5) % config.vocab_size for i in range(PROMPT)]

        def whole() -> mx.array:
            resident = checkpoint.load([t5.EMBEDDING_KEY])[t5.EMBEDDING_KEY].astype(mx.float32)
            return evaluated(resident[mx.array(ids)])

        yield Study(
            "T5's embedding rows read from disk, not the table",
            f"{config.vocab_size} x {config.d_model} float16 on (cached) disk, {PROMPT} rows",
            whole,
            lambda: evaluated(checkpoint.read_rows(t5.EMBEDDING_KEY, ids).astype(mx.float32)),
        )


class Denoiser:
    """One block pair of STDiT3-XL/2 with a prompt; what a step costs with and without a saving."""

    def __init__(self) -> None:
        self.config = STDiT3Config(depth=1)
        self.model = STDiT3(self.config)
        self.pair = (self.model.spatial_blocks[0], self.model.temporal_blocks[0])
        # Gates and projections start at zero, which would hide every difference.
        for block in self.pair:
            block.scale_shift_table = 0.3 * normal(6, self.config.hidden_size)
        mx.eval(self.model.parameters())
        self.padded = normal(PADDED, self.config.caption_channels)
        self.prompt = evaluated(self.padded[:PROMPT])
        self.mask = (mx.arange(PADDED) < PROMPT)[None, None, None]
        self.z, self.t = normal(1, *GRID, self.config.in_channels), mx.array([500.0])
        self.kept = self.prepare(self.prompt)
        self.step(self.kept)

    def prepare(self, text: mx.array) -> Conditions:
        return self.model.prepare([text], GRID, height=128, width=128, fps=24)

    def padded_text(self) -> Conditions:
        """Fresh conditions with text that is padded and masked, as in the reference."""
        return replace(self.prepare(self.padded), text_mask=self.mask)

    def step(self, conditions: Conditions) -> mx.array:
        return evaluated(self.model(self.z, self.t, conditions))

    def keys_values(self) -> mx.array:
        halves = [block.cross_attn.keys_values(self.kept.text) for block in self.pair]
        return evaluated(mx.stack([k for half in halves for k in half]))

    def embedded_text(self) -> mx.array:
        out: mx.array = self.model.y_embedder.y_proj(self.prompt)
        return evaluated(out)

    def embedded_position(self) -> mx.array:
        """Of 426 x 240 pixels at 24 frames per second: 15 x 27 tokens, and the frame rate."""
        position = position_embedding(15, 27, self.config.hidden_size, 320 / 512)
        return evaluated(position + self.model.fps_embedder(mx.array([24.0]), mx.float32))


def times(count: int, work: Callable[[], mx.array]) -> Callable[[], mx.array]:
    """Do it `count` times, keeping the last result only."""

    def run() -> mx.array:
        for _ in range(count - 1):
            work()
        return work()

    return run


def denoiser() -> Iterator[Study]:
    network = Denoiser()
    step = f"1 block pair of XL/2, {GRID[0]} x {GRID[1] * GRID[2] // 4} video tokens"
    padded = network.padded_text()
    network.step(padded)
    yield Study(
        "prompt not padded: a step of STDiT",
        f"{step}; {PROMPT} text tokens, not {PADDED}",
        lambda: network.step(padded),
        lambda: network.step(network.kept),
    )
    parts = {
        "text keys and values": (network.keys_values, f"1 block pair of XL/2, {PROMPT} tokens"),
        "text embedding": (network.embedded_text, f"MLP of XL/2, {PROMPT} tokens"),
        "position and frame rate": (network.embedded_position, "15 x 27 tokens of XL/2"),
    }
    for name, (work, geometry) in parts.items():
        yield Study(
            f"{name} once per run",
            f"{geometry}; once, not {STEPS} times",
            times(STEPS, work),
            work,
        )
    yield Study(
        "all of STDiT's together: a step",
        f"{step}; {PADDED} text tokens embedded and projected in it, or {PROMPT} beforehand",
        lambda: network.step(network.padded_text()),
        lambda: network.step(network.kept),
    )


def convolution() -> Iterator[Study]:
    channels, size = 128, (9, 24, 24)
    x, weight = normal(2, *size, channels), normal(3, 3, 3, channels, channels)
    kernel = evaluated(mx.contiguous(weight.transpose(3, 0, 1, 2, 4)))
    geometry = f"2 x {' x '.join(map(str, size))}, {channels} channels"

    def batched() -> mx.array:
        # Both ends of time padded by the convolution; what saw the far end is cut off.
        return evaluated(mx.conv3d(x, kernel, padding=(2, 1, 1))[:, : size[0]])

    def one_by_one() -> mx.array:
        samples = [evaluated(conv.plain_conv3d(x[b : b + 1], weight)) for b in range(2)]
        return evaluated(mx.concatenate(samples))

    yield Study("conv3d by sample, time padded beforehand", geometry, batched, one_by_one)


def studies() -> Iterator[Study]:
    """One after the other: what a study holds is free before the next begins."""
    for group in (text_encoder, embedding_table, denoiser, convolution):
        yield from group()
        release()


if __name__ == "__main__":
    sys.exit(report(__doc__, "savings.json", studies))
