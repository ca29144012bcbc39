"""Cache of encoded videos: the diffusion model trains on these, the VAE runs once per video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.torch_vae import VideoVAE
from benchmarks.shapes.train_vae import new_vae, psnr, random_frame, to_unit

# Videos per number of 17-frame chunks; the first ones are encoded before training begins.
COUNTS = {1: 12000, 2: 1500, 3: 1250}
FIRST, BLOCK, IMAGES = 3000, 250, 2000


def averaged_vae(folder: Path) -> VideoVAE:
    """The VAE of the last VAE phase with averaged weights, latents not yet normalised."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / "refine.pt", weights_only=False)["parts"]["average"])
    return vae.eval()


def final_vae(folder: Path) -> VideoVAE:
    """The VAE with the latents' statistics in `shift` and `scale`."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / "vae_final.pt", weights_only=True))
    return vae.eval()


@torch.no_grad()
def cache_latents(folder: Path, choices: list[world.Attributes]) -> None:
    """Encode the first random videos, set shift and scale; writes latents_*.pt, vae_final.pt.

    The rest of the cache is encoded while the diffusion model trains (`LatentSet.grow`).
    """
    vae = averaged_vae(folder)
    for part in range(FIRST // BLOCK):
        path = _block_path(folder, 1, part)
        if not path.exists():
            torch.save(_encode_block(vae, choices, 1, part), path)
            print("latents", part, flush=True)
    sample = torch.cat([load_block(p)[1] for p in sorted(folder.glob("latents_1_*.pt"))])
    vae.shift.copy_(sample.mean((0, 2, 3, 4), keepdim=True))
    vae.scale.copy_(sample.std((0, 2, 3, 4), keepdim=True))
    torch.save(vae.state_dict(), folder / "vae_final.pt")


def _block_path(folder: Path, chunks: int, part: int) -> Path:
    return folder / f"latents_{chunks}_{part:03d}.pt"


def _encode_block(
    vae: VideoVAE, choices: list[world.Attributes], chunks: int, part: int
) -> tuple[Tensor, Tensor]:
    """(combination numbers [N], raw latents [N, 4, 5 * chunks, 8, 8] in float16)."""
    rng = np.random.default_rng((6, chunks, part))
    vae.shift.zero_()
    vae.scale.fill_(1)
    indices, rows = [], []
    for _ in range(BLOCK):
        index = int(rng.integers(len(choices)))
        _, clip = world.random_clip(rng, [choices[index]], chunks * world.CHUNK)
        x = to_unit(clip).transpose(0, 1)[None]
        indices.append(index)
        rows.append(vae.encode(x)[0].half())
    return torch.tensor(indices), torch.stack(rows)


@torch.no_grad()
def _encode_images(vae: VideoVAE, choices: list[world.Attributes]) -> tuple[Tensor, Tensor]:
    """(combination numbers [N], raw latents [N, 4, 1, 8, 8]) of single frames of random videos."""
    rng = np.random.default_rng((6, 0))
    indices, rows = torch.from_numpy(rng.integers(len(choices), size=IMAGES)), []
    for part in indices.split(IMAGES // 50):
        images = np.concatenate([random_frame(rng, [choices[i]]) for i in part.tolist()])
        rows.append(vae.encode(to_unit(images)[:, :, None]))
    return indices, torch.cat(rows)


def load_block(path: Path) -> tuple[Tensor, Tensor]:
    """(combination numbers, raw latents in float32) of one cache file."""
    indices, latents = torch.load(path, weights_only=True)
    return indices, latents.float()


class LatentSet:
    """Normalised latents by number of chunks, 0 for single images; grows up to `COUNTS`."""

    def __init__(self, folder: Path, choices: list[world.Attributes]) -> None:
        self.folder, self.choices = folder, choices
        final = final_vae(folder)
        self.shift, self.scale = final.shift[0], final.scale[0]
        self.vae = averaged_vae(folder)
        self.data: dict[int, tuple[np.ndarray, Tensor]] = {}
        for chunks in COUNTS:
            for path in sorted(folder.glob(f"latents_{chunks}_*.pt")):
                self._add(chunks, *load_block(path))
        self._add(0, *_encode_images(self.vae, choices))

    def _add(self, chunks: int, indices: Tensor, z: Tensor) -> None:
        z = (z - self.shift[None]) / self.scale[None]
        if chunks in self.data:
            old, rows = self.data[chunks]
            self.data[chunks] = np.concatenate([old, indices.numpy()]), torch.cat([rows, z])
        else:
            self.data[chunks] = indices.numpy(), z

    @torch.no_grad()
    def grow(self, rank: int, size: int, wait: Callable[[], None]) -> None:
        """Encode one more block per member, of the length that is furthest behind its target."""
        have = {k: len(self.data[k][0]) if k in self.data else 0 for k in COUNTS}
        chunks = min(COUNTS, key=lambda k: have[k] / COUNTS[k])
        if have[chunks] >= COUNTS[chunks]:
            return
        first = have[chunks] // BLOCK
        block = _encode_block(self.vae, self.choices, chunks, first + rank)
        torch.save(block, _block_path(self.folder, chunks, first + rank))
        wait()
        for part in range(first, first + size):
            self._add(chunks, *load_block(_block_path(self.folder, chunks, part)))

    def batch(self, chunks: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """(combination numbers [count], latents [count, 4, T, 8, 8])."""
        indices, z = self.data[chunks]
        rows = rng.integers(len(indices), size=count)
        return indices[rows], z[torch.from_numpy(rows)]


@torch.no_grad()
def reconstruction_psnr(vae: VideoVAE, choices: list[world.Attributes], frames: int) -> float:
    """Mean PSNR in dB of one random video per combination, through the whole pipeline."""
    rng = np.random.default_rng(7)
    values = []
    for attributes in choices:
        _, clip = world.random_clip(rng, [attributes], frames)
        x = to_unit(clip).transpose(0, 1)[None]
        values.append(psnr(vae.decode(vae.encode(x), frames), x))
    return float(np.mean(values))
