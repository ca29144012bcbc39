"""Cache of encoded videos: the diffusion model trains on these, the VAE runs once per video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.torch_vae import VideoVAE
from benchmarks.shapes.train_vae import averaged, psnr, random_frame, spatial_latents, to_unit

# Videos per number of 17-frame chunks: at first, and when the cache has grown to its end; for a
# new model, and for one that is trained further.
NEW = {1: (3000, 12000), 2: (0, 1500), 3: (0, 1250)}
CONTINUED = {1: (500, 6000), 2: (250, 3000), 3: (250, 2000), 4: (250, 2000)}
BLOCK, IMAGES = 250, 6000
LATENTS = 5  # of a chunk


def final_vae(folder: Path) -> VideoVAE:
    """The VAE of the latest phase with the latents' statistics in `shift` and `scale`."""
    phases = ("settle", "decode", "refine")
    phase = next(name for name in phases if (folder / f"{name}.pt").exists())
    vae = averaged(folder, phase).eval()
    for name, value in torch.load(folder / "statistics.pt", weights_only=True).items():
        getattr(vae, name).copy_(value)
    return vae


@torch.no_grad()
def cache_latents(
    folder: Path, choices: list[world.Attributes], counts: dict[int, tuple[int, int]]
) -> None:
    """Encode the first random videos; writes latents_*.pt, and statistics.pt where there is none.

    The rest of the cache is encoded while the diffusion model trains (`LatentSet.grow`).
    """
    vae = averaged(folder, "refine").eval()
    for chunks, (first, _) in counts.items():
        for part in range(first // BLOCK):
            path = _block_path(folder, chunks, part)
            if not path.exists():
                torch.save(_encode_block(vae, choices, chunks, part), path)
                print("latents", chunks, part, flush=True)
    if not (folder / "statistics.pt").exists():
        paths = sorted(folder.glob("latents_1_*.pt"))
        sample = torch.cat([load_block(path)[1][:, :, :LATENTS] for path in paths])
        mean = sample.mean((0, 2, 3, 4), keepdim=True)
        scale = sample.std((0, 2, 3, 4), keepdim=True)
        torch.save({"shift": mean, "scale": scale}, folder / "statistics.pt")


def _block_path(folder: Path, chunks: int, part: int) -> Path:
    return folder / f"latents_{chunks}_{part:03d}.pt"


def _encode_block(
    vae: VideoVAE, choices: list[world.Attributes], chunks: int, part: int
) -> tuple[Tensor, Tensor]:
    """(combination numbers [N], raw latents [N, 4, 10 * chunks + 1, 8, 8] in float16)."""
    rng = np.random.default_rng((6, chunks, part))
    indices, rows = [], []
    for _ in range(BLOCK):
        index = int(rng.integers(len(choices)))
        _, clip = world.random_clip(rng, [choices[index]], chunks * world.CHUNK)
        indices.append(index)
        rows.append(_encode_swing(vae, clip).half())
    return torch.tensor(indices), torch.stack(rows)


def _encode_swing(vae: VideoVAE, clip: np.ndarray) -> Tensor:
    """A clip there and back, chunk by chunk, then its first frame as that of a still chunk."""
    z = spatial_latents(vae, to_unit(clip).transpose(0, 1)[None])[0]
    still = z[:, :1].expand(-1, world.CHUNK, -1, -1)
    chunks = torch.stack(torch.cat([z, z.flip(1), still], dim=1).split(world.CHUNK, dim=1))
    mean, _ = vae.temporal_vae.moments(chunks)
    return mean.transpose(0, 1).flatten(1, 2)[:, : 1 - LATENTS]


@torch.no_grad()
def _encode_images(vae: VideoVAE, choices: list[world.Attributes]) -> tuple[Tensor, Tensor]:
    """(combination numbers [N], raw latents [N, 4, 1, 8, 8]) of single frames of random videos."""
    rng = np.random.default_rng((6, 0))
    indices, rows = torch.from_numpy(rng.integers(len(choices), size=IMAGES)), []
    for part in indices.split(40):
        images = np.concatenate([random_frame(rng, [choices[i]]) for i in part.tolist()])
        rows.append(vae.encode(to_unit(images)[:, :, None]))
    return indices, torch.cat(rows)


def load_block(path: Path) -> tuple[Tensor, Tensor]:
    """(combination numbers, raw latents in float32) of one cache file."""
    indices, latents = torch.load(path, weights_only=True)
    return indices, latents.float()


def turn(
    indices: np.ndarray, z: Tensor, choices: list[world.Attributes]
) -> tuple[np.ndarray, Tensor]:
    """Videos of a cache file that begin on their way back, as the videos they then are.

    A shape on its way back from the left moves right. Combinations that are not among `choices`
    are left out; the first frame of a video stands for a picture of it.
    """
    numbers = {attributes: number for number, attributes in enumerate(choices)}
    back = [replace(a, motion=world.BACKWARDS[a.motion]) for a in choices]
    new = np.array([numbers.get(a, -1) for a in back])[indices]
    rows = torch.from_numpy(np.flatnonzero(new >= 0))
    swing = z[rows, :, :-1]
    swing = swing.roll(swing.shape[2] // 2, dims=2)
    return new[new >= 0], torch.cat([swing, swing[:, :, :1]], dim=2)


@dataclass(frozen=True)
class Batch:
    """Videos to learn from.

    indices: combination numbers [B].  z: latents [B, 4, T, 8, 8].  first: the first latent frame
    if the first frame of the video stood still [B, 4, 8, 8].  begun: chunks of the swing that went
    before [B]; where it is not 0, something must be given to know how the video goes on.
    """

    indices: np.ndarray
    z: Tensor
    first: Tensor
    begun: np.ndarray


class LatentSet:
    """Normalised latents by number of chunks, 0 for single images; grows up to its counts."""

    def __init__(
        self, folder: Path, choices: list[world.Attributes], counts: dict[int, tuple[int, int]]
    ) -> None:
        self.folder, self.choices = folder, choices
        self.most = {chunks: most for chunks, (_, most) in counts.items()}
        final = torch.load(folder / "statistics.pt", weights_only=True)
        self.shift, self.scale = final["shift"], final["scale"]
        self.vae = averaged(folder, "refine").eval()
        self.data: dict[int, tuple[np.ndarray, Tensor]] = {}
        self.videos: dict[int, int] = {}
        for chunks in self.most:
            for path in sorted(folder.glob(f"latents_{chunks}_*.pt")):
                self._add(chunks, *load_block(path))
        path = _block_path(folder, 0, 0)
        if not path.exists():
            torch.save(_encode_images(self.vae, choices), path)
        self._add(0, *load_block(path))

    def _add(self, chunks: int, indices: Tensor, z: Tensor) -> None:
        both = indices.numpy(), (z - self.shift) / self.scale
        if chunks:
            turned = turn(*both, self.choices)
            both = np.concatenate([both[0], turned[0]]), torch.cat([both[1], turned[1]])
        if chunks in self.data:
            old, rows = self.data[chunks]
            both = np.concatenate([old, both[0]]), torch.cat([rows, both[1]])
        self.data[chunks] = both
        self.videos[chunks] = self.videos.get(chunks, 0) + len(indices)

    @torch.no_grad()
    def grow(self, rank: int, size: int, wait: Callable[[], None]) -> None:
        """Encode one more block per member, of the length that is furthest behind its target."""
        have = {k: self.videos.get(k, 0) for k in self.most}
        chunks = min(self.most, key=lambda k: have[k] / self.most[k])
        if have[chunks] >= self.most[chunks]:
            return
        first = have[chunks] // BLOCK
        block = _encode_block(self.vae, self.choices, chunks, first + rank)
        torch.save(block, _block_path(self.folder, chunks, first + rank))
        wait()
        for part in range(first, first + size):
            self._add(chunks, *load_block(_block_path(self.folder, chunks, part)))

    def batch(self, chunks: int, count: int, rng: np.random.Generator, share: float = 0.5) -> Batch:
        """`count` videos of `chunks` chunks; that share of longer ones begin within their swing."""
        indices, z = self.data[chunks]
        rows = rng.integers(len(indices), size=count)
        picked, begun = z[torch.from_numpy(rows)], np.zeros(count, int)
        if chunks > 1:
            begun = rng.integers(2 * chunks, size=count) * (rng.random(count) < share)
        there = range(max(1, LATENTS * chunks))
        around = 2 * LATENTS * chunks or 1
        parts = [
            row[:, [(LATENTS * int(b) + i) % around for i in there]]
            for row, b in zip(picked, begun, strict=True)
        ]
        return Batch(indices[rows], torch.stack(parts), picked[:, :, -1], begun)


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
