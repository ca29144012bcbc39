"""Training of the decoders on what the transformer makes; the VAE's last phase, `settle`.

Latents that a diffusion model makes are a little off, in every chunk otherwise: colours and edges
change where chunks meet, though nothing moves. Decoders that have seen such latents draw what was
meant.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.captions import CaptionBank
from benchmarks.shapes.latents import LATENTS
from benchmarks.shapes.sample import GUIDANCE, guided_velocity
from benchmarks.shapes.torch_stdit import STDiT3
from benchmarks.shapes.train_decode import Block, DecoderCourse, Drawing, Pool, train_decoders
from benchmarks.shapes.train_vae import averaged

STEPS, RATE, EVALUATIONS = 400, 2e-4, 4


class MadePool(Pool):
    """Blocks of which the transformer made half again, from some noise on.

    A block is made again by its number alone, so that a run that was stopped sees the same ones.
    """

    def __init__(
        self, folder: Path, transformer: STDiT3, bank: CaptionBank, choices: list[world.Attributes]
    ) -> None:
        super().__init__(folder, choices)
        self.transformer, self.bank = transformer.eval(), bank
        self.numbers = {attributes: number for number, attributes in enumerate(choices)}

    def block(self, number: int) -> Block:
        block, rng = super().block(number), np.random.default_rng((15, number))
        with torch.random.fork_rng():
            torch.manual_seed(number)
            z = self.make_half_again(block.z, block.pairs, rng)
            image_z = self.make_half_again(block.image_z, block.images, rng)
        return replace(block, z=z, image_z=image_z)

    def make_half_again(
        self, z: Tensor, drawings: list[Drawing], rng: np.random.Generator
    ) -> Tensor:
        """Latents [N, 4, T, 8, 8], not normalised, the first half of them made again."""
        half = len(z) // 2
        indices = np.array([self.numbers[d.attributes] for d in drawings[:half]])
        made = (z[:half] - self.shift) / self.scale
        made = self.make_again(made, self.bank.batch(indices, rng), rng)
        return torch.cat([made * self.scale + self.shift, z[half:]])

    @torch.no_grad()
    def make_again(
        self, z: Tensor, text: tuple[Tensor, Tensor], rng: np.random.Generator
    ) -> Tensor:
        """Latents [B, 4, T, 8, 8] noised and denoised; of some pairs the first chunk is given."""
        keep = torch.ones(len(z), z.shape[2], dtype=torch.bool)
        if z.shape[2] > LATENTS:
            keep[: len(z) // 2, :LATENTS] = False
        start = float(rng.uniform(0.2, 0.6))
        generated = keep[:, None, :, None, None]
        level = torch.where(generated, start, 0.0)
        x = (1 - level) * z + level * torch.randn_like(z)
        for i in range(EVALUATIONS):
            t = start * (1 - i / EVALUATIONS)
            v = guided_velocity(self.transformer, x, text, t, GUIDANCE, keep)
            x = torch.where(generated, x + v * start / EVALUATIONS, x)
        return x


def train_settle(pool: MadePool) -> None:
    """Writes the phase `settle`."""
    train_decoders(DecoderCourse("settle", STEPS, RATE), averaged(pool.folder, "decode"), pool)
