"""Training of the decoders on what the transformer makes; the VAE's last phase, `settle`.

Latents that a diffusion model makes are a little off, in every chunk otherwise: colours and edges
change where chunks meet, though nothing moves. Decoders that have seen such latents draw what was
meant.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.captions import CaptionBank
from benchmarks.shapes.latents import LATENTS
from benchmarks.shapes.sample import GUIDANCE, guided_velocity
from benchmarks.shapes.torch_stdit import STDiT3
from benchmarks.shapes.train_vae import (
    DecoderCourse,
    Pair,
    averaged,
    encoded_pair,
    train_decoders,
)

STEPS, AT_ONCE, EVALUATIONS = 1500, 8, 4


class Maker:
    """Pairs of chunks of which the transformer made one or both again, from some noise on."""

    def __init__(
        self, folder: Path, transformer: STDiT3, bank: CaptionBank, choices: list[world.Attributes]
    ) -> None:
        self.transformer, self.bank, self.choices = transformer.eval(), bank, choices
        self.vae = averaged(folder, "refine").eval()
        statistics = torch.load(folder / "statistics.pt", weights_only=True)
        self.shift, self.scale = statistics["shift"][0], statistics["scale"][0]

    def pairs(self, rng: np.random.Generator) -> list[Pair]:
        """`AT_ONCE` new pairs."""
        encoded = [encoded_pair(self.vae, rng, self.choices) for _ in range(AT_ONCE)]
        z = torch.stack([(pair.z - self.shift) / self.scale for pair in encoded])
        text = self.bank.batch(np.array([pair.index for pair in encoded]), rng)
        z = self.make_again(z, text, rng)
        return [
            Pair(pair.index, pair.x, pair.target, row * self.scale + self.shift)
            for pair, row in zip(encoded, z, strict=True)
        ]

    @torch.no_grad()
    def make_again(
        self, z: Tensor, text: tuple[Tensor, Tensor], rng: np.random.Generator
    ) -> Tensor:
        """Latents [B, 4, T, 8, 8] noised and denoised; of half of them the first chunk is given."""
        keep = torch.ones(len(z), z.shape[2], dtype=torch.bool)
        keep[: len(z) // 2, :LATENTS] = False
        start = float(rng.uniform(0.3, 0.8))
        generated = keep[:, None, :, None, None]
        level = torch.where(generated, start, 0.0)
        x = (1 - level) * z + level * torch.randn_like(z)
        for i in range(EVALUATIONS):
            t = start * (1 - i / EVALUATIONS)
            v = guided_velocity(self.transformer, x, text, t, GUIDANCE, keep)
            x = torch.where(generated, x + v * start / EVALUATIONS, x)
        return x


def train_settle(folder: Path, maker: Maker) -> None:
    """Writes the phase `settle`."""
    vae = averaged(folder, "decode" if (folder / "decode.pt").exists() else "meet")
    course = DecoderCourse("settle", STEPS, 6e-4, every=10)
    train_decoders(folder, vae, course, maker.pairs, maker.choices)
