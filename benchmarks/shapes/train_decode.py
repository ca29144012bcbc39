"""Longer training of the VAE's decoders on latents that stay valid; phase `decode`.

The encoders hold all that a video shows; decoders that have seen more of them draw it sharper.
Videos are encoded once: pairs of neighbouring chunks of a swing, and single images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.run_state import Average, RunState, set_rate, steady_schedule
from benchmarks.shapes.torch_vae import LATENT_FACTOR, VideoVAE
from benchmarks.shapes.train_vae import averaged, psnr, spatial_latents, to_unit

BLOCK_PAIRS, BLOCK_IMAGES, BLOCKS, NEW_BLOCK_EVERY = 40, 160, 80, 40
PAIRS, IMAGES, IMAGE_SHARE = 4, 32, 0.25
RATE, DISTURBED = 2.5e-4, 0.15
MEETING = 3.0  # further weight of the change from chunk to chunk, which the eye finds first

Loss = tuple[Tensor, dict[str, float]]


@dataclass(frozen=True)
class Drawing:
    """What was encoded: enough to draw any of its frames again."""

    attributes: world.Attributes
    path: world.Path
    times: np.ndarray

    def frames(self, picked: list[int]) -> Tensor:
        """[N, 3, 64, 64] in [-1, 1]."""
        return to_unit(world.render(self.attributes, self.path, self.times[picked]))


@dataclass(frozen=True)
class Block:
    """Encoded videos: pairs z [N, 4, 10, 8, 8] with spatial latents `target` [N, 4, 34, 8, 8]."""

    pairs: list[Drawing]
    z: Tensor
    target: Tensor
    images: list[Drawing]
    image_z: Tensor


def random_drawing(
    rng: np.random.Generator, choices: list[world.Attributes], single: bool
) -> Drawing:
    """One frame of a video, or two neighbouring chunks of a swing, a quarter of them still."""
    if not single and rng.random() < 0.15:
        choices = [a for a in choices if a.motion == "still"]
    attributes = choices[rng.integers(len(choices))]
    path = world.random_path(attributes.motion, rng)
    if single:
        # The ends of a motion show the largest shapes, and are what pictures show.
        times = np.clip(rng.uniform(-0.15, 1.15, 1), 0.0, 1.0)
    else:
        chunks = int(rng.integers(1, 5))
        first = int(rng.integers(2 * chunks)) * world.CHUNK
        times = world.swing(chunks * world.CHUNK, first, 2 * world.CHUNK)
    return Drawing(attributes, path, times)


@torch.no_grad()
def encode_block(vae: VideoVAE, choices: list[world.Attributes], number: int) -> Block:
    """Random videos of one number, always the same."""
    rng = np.random.default_rng((14, number))
    pairs = [random_drawing(rng, choices, False) for _ in range(BLOCK_PAIRS)]
    images = [random_drawing(rng, choices, True) for _ in range(BLOCK_IMAGES)]
    z, targets = [], []
    for pair in pairs:
        x = pair.frames(list(range(2 * world.CHUNK)))
        target = spatial_latents(vae, x.transpose(0, 1)[None])
        z += [torch.cat([vae.temporal_vae.moments(c)[0] for c in target.chunk(2, 2)], dim=2)]
        targets.append(target)
    parts = torch.cat([image.frames([0]) for image in images])[:, :, None].split(32)
    image_z = [vae.temporal_vae.moments(spatial_latents(vae, x))[0] for x in parts]
    return Block(pairs, torch.cat(z), torch.cat(targets), images, torch.cat(image_z))


class Pool:
    """Encoded blocks under a folder; a new one now and then, up to `BLOCKS`."""

    def __init__(self, folder: Path, choices: list[world.Attributes]) -> None:
        self.folder, self.choices = folder, choices
        self.vae = averaged(folder, "refine").eval()
        statistics = torch.load(folder / "statistics.pt", weights_only=True)
        self.shift, self.scale = statistics["shift"], statistics["scale"]
        self.blocks: list[Block] = []

    def fill(self, count: int) -> None:
        """Hold `count` blocks, at most `BLOCKS`."""
        for number in range(len(self.blocks), min(count, BLOCKS)):
            self.blocks.append(self.block(number))

    def block(self, number: int) -> Block:
        """A block from its file, or encoded and written there."""
        path = self.folder / f"pairs_{number:03d}.pt"
        if not path.exists():
            torch.save(encode_block(self.vae, self.choices, number), path)
        block = torch.load(path, weights_only=False)
        assert isinstance(block, Block)
        return block

    def disturb(self, z: Tensor) -> Tensor:
        """Half of the latents a little off, as those of a diffusion model are."""
        level = (
            DISTURBED * torch.rand(len(z), 1, 1, 1, 1) * torch.randint(0, 2, (len(z), 1, 1, 1, 1))
        )
        return z + level * self.scale * torch.randn_like(z)


def sharp_error(y: Tensor, truth: Tensor) -> Tensor:
    """Absolute and squared error of images, and its logarithm image by image, as PSNR has it."""
    squared = (y - truth).square().mean((1, 2, 3))
    return (y - truth).abs().mean() + 2.0 * squared.mean() + 0.01 * (squared + 1e-4).log().mean()


def image_loss(vae: VideoVAE, pool: Pool, rng: np.random.Generator) -> Loss:
    """Loss of single images."""
    block = pool.blocks[rng.integers(len(pool.blocks))]
    rows = rng.integers(BLOCK_IMAGES, size=IMAGES)
    truth = torch.cat([block.images[i].frames([0]) for i in rows])
    z = pool.disturb(block.image_z[torch.from_numpy(rows)])
    with torch.autocast("cpu", torch.bfloat16):
        y = vae.spatial.decode(vae.temporal_vae.decode(z, 1)[:, :, 0] / LATENT_FACTOR)
    y = y.float()
    return sharp_error(y, truth), {"image_psnr": psnr(y.detach(), truth)}


def pair_loss(vae: VideoVAE, pool: Pool, rng: np.random.Generator) -> Loss:
    """Loss of pairs: the first frame, three around the meeting, three neighbours elsewhere."""
    block = pool.blocks[rng.integers(len(pool.blocks))]
    rows = rng.integers(BLOCK_PAIRS, size=PAIRS)
    index = torch.from_numpy(rows)
    z, target = pool.disturb(block.z[index]), block.target[index]
    elsewhere = int(rng.integers(1, 2 * world.CHUNK - 2))
    meeting = world.CHUNK - int(rng.integers(1, 3))
    picked = [0, *range(meeting, meeting + 3), *range(elsewhere, elsewhere + 3)]
    truth = torch.stack([block.pairs[i].frames(picked) for i in rows])
    with torch.autocast("cpu", torch.bfloat16):
        chunks = torch.cat(z.chunk(2, 2))
        s = torch.cat(vae.temporal_vae.decode(chunks, world.CHUNK).chunk(2), dim=2)
        y = vae.spatial.decode(s[:, :, picked].transpose(1, 2).flatten(0, 1) / LATENT_FACTOR)
    s, y = s.float(), y.float().unflatten(0, (PAIRS, -1))
    changes = (y.diff(dim=1) - truth.diff(dim=1)).abs().mean((0, 2, 3, 4))
    change = changes[1:3].mean() + changes[4:].mean()
    seam = changes[world.CHUNK - meeting]
    near = F.mse_loss(s, target) / target.var()
    steady = F.mse_loss(s.diff(dim=2), target.diff(dim=2)) / target.var()
    error = sharp_error(y.flatten(0, 1), truth.flatten(0, 1))
    levels = {"psnr": psnr(y.detach(), truth), "first": psnr(y.detach()[:, :1], truth[:, :1])}
    levels |= {"change": 127.5 * change.item() / 2, "near": near.item()}
    levels["seam"] = 127.5 * seam.item()
    return error + change + MEETING * seam + 0.02 * near + 0.2 * steady, levels


def decoder_parameters(vae: VideoVAE) -> list[torch.nn.Parameter]:
    """What draws; the encoders stay, so that latents stay valid."""
    trained = [*vae.temporal_vae.decoder.parameters(), *vae.spatial.decoder.parameters()]
    trained += vae.temporal_vae.post_quant_conv.parameters()
    return [*trained, *vae.spatial.post_quant_conv.parameters()]


def train_decode(folder: Path, choices: list[world.Attributes], steps: int) -> None:
    """Writes the phase `decode`; more steps than before go on from where it ended."""
    course = DecoderCourse("decode", steps, RATE)
    train_decoders(course, averaged(folder, "refine"), Pool(folder, choices))


@dataclass(frozen=True)
class DecoderCourse:
    """A phase of the decoders: its steps and highest rate."""

    phase: str
    steps: int
    rate: float


def train_decoders(course: DecoderCourse, vae: VideoVAE, pool: Pool) -> None:
    """Teach `vae` what the pool holds; its encoders stay, so that latents stay valid."""
    trained = decoder_parameters(vae)
    optimizer = torch.optim.AdamW(trained, course.rate, (0.9, 0.98), weight_decay=0.0)
    average = Average(vae, 0.998)
    parts = {"vae": vae, "optimizer": optimizer, "average": average}
    run, seen = RunState(pool.folder, course.phase, parts, seed=15), dict[str, list[float]]()
    while run.step < course.steps:
        pool.fill(4 + run.step // NEW_BLOCK_EVERY)
        set_rate(optimizer, steady_schedule(run.step, course.steps, course.rate, warm=200))
        kind = image_loss if run.rng.random() < IMAGE_SHARE else pair_loss
        loss, levels = kind(vae, pool, run.rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        run.step += 1
        average.update(vae, run.step)
        for name, value in levels.items():
            seen.setdefault(name, []).append(value)
        if run.step % 25 == 0:
            run.log(**{name: float(np.mean(values)) for name, values in seen.items()})
            seen.clear()
        if run.step % 50 == 0 or run.step == course.steps:
            run.save()
