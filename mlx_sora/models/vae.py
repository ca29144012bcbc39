"""The video VAE: frames to latents and back, in independent chunks of 17 frames.

Mirrors VideoAutoencoderPipeline of Open-Sora 1.2 (its config.json and its checkpoint). Channels
last: frames [B, F, H, W, 3] in [-1, 1], latents [B, T, h, w, C] of zero mean and unit variance.
Chunks do not depend on each other. Decoding them one at a time is exact, and its peak memory does
not grow with the clip.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_FRAMES
from mlx_sora.models import precision, vae_spatial, vae_temporal
from mlx_sora.models.config import get_object, require
from mlx_sora.models.hooks import BlockProvider
from mlx_sora.models.key_map import KeyMap, KeyRule
from mlx_sora.models.vae_spatial import NETWORKS, SpatialVAE, SpatialVAEConfig
from mlx_sora.models.vae_temporal import Layer, TemporalVAE, TemporalVAEConfig
from mlx_sora.models.vae_tiling import decode_tiled

#: Opens a provider of the temporal decoder's layers.
OpenBlocks = Callable[[], AbstractContextManager[BlockProvider[Layer] | None]]

#: Scale of the spatial VAE's latents; hard-coded in Open-Sora 1.2, not read from the config.
LATENT_FACTOR = 0.18215

#: Bounds of a posterior's log-variance.
LOGVAR_RANGE = (-30.0, 20.0)

#: Bounds of the scale and the shift of latents; the published ones are below 4.
MAX_SCALE = 1000.0


@dataclass(frozen=True)
class VAEConfig:
    """config.json of OpenSoraVAE; the two networks have the sizes of version 1.2 by default.

    shift, scale: per latent channel; latents are (z - shift) / scale; a checkpoint may hold others.
    micro_frame_size: frames per chunk, None = whole clip.
    micro_batch_size: frames per spatial pass, None = a chunk at once.
    """

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    micro_frame_size: int | None = 17
    micro_batch_size: int | None = 4
    shift: tuple[float, ...] = (-0.1, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """Read the published config.json; other keys are ignored.

        Optional objects `spatial_config` and `temporal_config` hold the networks' constructor
        arguments, which the published file lacks.
        """
        temporal = TemporalVAEConfig.from_dict(get_object(values, "temporal_config"))
        outer = {"micro_frame_size": cls.micro_frame_size, "micro_batch_size": cls.micro_batch_size}
        sizes = {name: values.get(name, default) for name, default in outer.items()}
        sizes |= {n: v for n, v in get_object(values, "vae_2d").items() if n == "micro_batch_size"}
        for name, size in sizes.items():
            whole = type(size) is int and 1 <= size <= MAX_FRAMES
            require(size is None or whole, f"{name} is not a number of frames")
        return cls(
            spatial=SpatialVAEConfig.from_dict(get_object(values, "spatial_config")),
            temporal=temporal,
            **sizes,
            shift=_read_per_channel(values, "shift", cls.shift, temporal.embed_dim),
            scale=_read_per_channel(values, "scale", cls.scale, temporal.embed_dim),
        )


def _read_per_channel(
    values: Mapping[str, Any], name: str, default: Sequence[float], channels: int
) -> tuple[float, ...]:
    value = values.get(name, default)
    numbers = [value] * channels if isinstance(value, int | float) else value
    whole = isinstance(numbers, list | tuple) and len(numbers) == channels
    valid = whole and all(type(n) in (int, float) and abs(n) <= MAX_SCALE for n in numbers)
    require(valid, f"{name} is not {channels} numbers up to {MAX_SCALE:g}")
    require(name == "shift" or 0 not in numbers, f"{name} is 0, which erases a channel,")
    return tuple(float(n) for n in numbers)


@dataclass(frozen=True)
class Chunk:
    """Frames [frame, frame + frames) and latents [latent, latent + latents) of one chunk."""

    frame: int
    frames: int
    latent: int
    latents: int


def chunk_plan(num_frames: int, micro_frame: int | None, factor: int = 4) -> list[Chunk]:
    """Cut a clip into chunks of `micro_frame` frames, the last one shorter.

    micro_frame: None means one chunk. factor: frames per latent. Raises UsageError without frames.
    """
    if num_frames < 1:
        raise UsageError(f"num_frames must be at least 1, got {num_frames}.", "Raise it.")
    size = micro_frame or num_frames
    plan: list[Chunk] = []
    latent = 0
    for frame in range(0, num_frames, size):
        frames = min(size, num_frames - frame)
        latents = -(-frames // factor)
        plan.append(Chunk(frame, frames, latent, latents))
        latent += latents
    return plan


@dataclass
class MicroBatch:
    """Frames per spatial pass; may be lowered between two chunks."""

    frames: int

    def halve(self) -> bool:
        """Halve the batch; return False if it is a single frame already."""
        self.frames, before = max(1, self.frames // 2), self.frames
        return self.frames < before


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents: mean and clamped log-variance, both [.., C]."""

    mean: mx.array
    logvar: mx.array

    @classmethod
    def from_moments(cls, moments: mx.array) -> Posterior:
        """Split an encoder's moments [.., 2C]."""
        mean, logvar = mx.split(moments, 2, axis=-1)
        return cls(mean, mx.clip(logvar, *LOGVAR_RANGE))

    def sample(self, noise: mx.array | None) -> mx.array:
        """Return mean + std · noise, or the mean without noise."""
        return self.mean if noise is None else self.mean + mx.exp(0.5 * self.logvar) * noise


@dataclass(frozen=True)
class EncodeNoise:
    """Standard normal draws of one `encode`, in the reference's order of drawing.

    spatial: [B·F, h, w, C], all frames of sample 0, then of sample 1, ... temporal: [B, T, h, w,
    C].
    """

    spatial: mx.array
    temporal: mx.array


class VideoVAE(nn.Module):
    """Spatial and temporal VAE with `networks` ("encoder", "decoder", or both).

    dtype: of both networks. Latents, frames and what lies between the networks are float32.
    """

    def __init__(
        self,
        config: VAEConfig,
        networks: Sequence[str] = NETWORKS,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.spatial_vae = SpatialVAE(config.spatial, networks)
        self.temporal_vae = TemporalVAE(config.temporal, networks)
        self.shift = mx.array(config.shift)[None]
        self.scale = mx.array(config.scale)[None]

    def chunks(self, num_frames: int) -> list[Chunk]:
        """Return the chunks in which a clip is encoded and decoded."""
        return chunk_plan(num_frames, self.config.micro_frame_size, self.config.temporal.factor)

    def latent_frames(self, num_frames: int) -> int:
        """Return the number of latent frames of a clip."""
        last = self.chunks(num_frames)[-1]
        return last.latent + last.latents

    def decode(self, z: mx.array, num_frames: int, micro_batch: int | None = None) -> mx.array:
        """Decode latents [B, T, h, w, C] to float32 frames [B, F, H, W, 3], about in [-1, 1]."""
        samples = [
            mx.concatenate(list(self.decode_chunks(z[b : b + 1], num_frames, micro_batch)))
            for b in range(z.shape[0])
        ]
        return mx.stack(samples)

    def decode_chunks(
        self,
        z: mx.array,
        num_frames: int,
        micro_batch: int | MicroBatch | None = None,
        *,
        sequential_offload: bool = False,
        open_blocks: OpenBlocks = nullcontext,
        tiles: int = 1,
        selection: slice = slice(None),
    ) -> Iterator[mx.array]:
        """Decode one sample chunk by chunk; yield evaluated float32 frames [<= 17, H, W, 3].

        Args:
            z: [1, T, h, w, C].
            micro_batch: frames per spatial pass (default: the config's); affects memory only.
            sequential_offload: decode all chunks with the temporal VAE first, then delete it, so
                that lazily loaded weights of both are never in memory at once. This VAE cannot be
                used again.
            open_blocks: opens the provider of the temporal decoder's layers for all chunks; None
                from it means that they are resident.
            tiles: decode frames in tiles x tiles parts, approximately (models/vae_tiling.py).
            selection: chunks to decode.

        Raises UsageError, before any work, if z does not hold num_frames frames.
        """
        latents = self.latent_frames(num_frames)
        if z.shape[0] != 1 or z.shape[1] != latents:
            raise UsageError(
                f"{num_frames} frames are 1 x {latents} latents, not {z.shape[0]} x {z.shape[1]}.",
                "Decode one sample at a time, with the number of frames it was made for.",
            )
        chunks = self.chunks(num_frames)[selection]
        parts: Iterable[mx.array] = self._decode_times(z, chunks, open_blocks)
        size = micro_batch or self.config.micro_batch_size
        decode = partial(decode_tiled, tiles=tiles)
        return self._decode_space(parts, decode, size, sequential_offload)

    def _decode_times(
        self, z: mx.array, chunks: Sequence[Chunk], open_blocks: OpenBlocks
    ) -> Iterator[mx.array]:
        with open_blocks() as blocks:
            for chunk in chunks:
                yield self._decode_time(z, chunk, blocks)

    def _decode_time(
        self, z: mx.array, chunk: Chunk, blocks: BlockProvider[Layer] | None
    ) -> mx.array:
        """Return the spatial latents of a chunk's frames, [frames, h, w, C], evaluated."""
        part = z[:, chunk.latent : chunk.latent + chunk.latents] * self.scale + self.shift
        vae = self.temporal_vae
        decode = partial(vae.decode, num_frames=chunk.frames, blocks=blocks)
        frames = self._run(vae, decode, part)[0]
        frames = frames / LATENT_FACTOR
        # Evaluate here, so that no later graph holds the temporal network's activations.
        mx.eval(frames)
        return frames

    def _decode_space(
        self,
        parts: Iterable[mx.array],
        decode: Callable[[SpatialVAE, mx.array], mx.array],
        micro_batch: int | MicroBatch | None,
        sequential_offload: bool,
    ) -> Iterator[mx.array]:
        if sequential_offload:
            parts = list(parts)
            del self["temporal_vae"]
            mx.synchronize()  # GPUs free buffers after the work that used them
            mx.clear_cache()
        for frames in parts:
            size = micro_batch.frames if isinstance(micro_batch, MicroBatch) else micro_batch
            yield _in_batches(
                partial(self._run, self.spatial_vae, partial(decode, self.spatial_vae)),
                frames,
                size,
            )

    def encode(
        self, x: mx.array, noise: EncodeNoise | None = None, micro_batch: int | None = None
    ) -> mx.array:
        """Encode frames [B, F, H, W, 3] in [-1, 1] to latents [B, T, H // 8, W // 8, C].

        noise: draws to sample both posteriors with; without it, the result is the posteriors'
        means.
        """
        b, f, h, w, _ = x.shape
        frames = x.reshape(b * f, h, w, -1)
        micro_batch = micro_batch or self.config.micro_batch_size
        moments = _in_batches(
            partial(self._run, self.spatial_vae, self.spatial_vae.encode), frames, micro_batch
        )
        draws = noise.spatial if noise else None
        z = Posterior.from_moments(moments).sample(draws) * LATENT_FACTOR
        z = z.reshape(b, f, *z.shape[1:])
        parts = []
        for chunk in self.chunks(f):
            frames = z[:, chunk.frame : chunk.frame + chunk.frames]
            moments = self._run(self.temporal_vae, self.temporal_vae.encode, frames)
            span = slice(chunk.latent, chunk.latent + chunk.latents)
            draws = noise.temporal[:, span] if noise else None
            parts.append(Posterior.from_moments(moments).sample(draws))
            mx.eval(parts[-1])
        return (mx.concatenate(parts, axis=1) - self.shift) / self.scale

    def encode_chunks(
        self,
        chunks: Iterable[mx.array],
        micro_batch: int | None = None,
        *,
        sequential_offload: bool = False,
    ) -> Iterator[mx.array]:
        """Encode chunks of one or of several clips independently, to the posteriors' means.

        Args:
            chunks: frames [<= 17, H, W, 3] in [-1, 1], read one at a time.
            micro_batch: frames per spatial pass (default: the config's).
            sequential_offload: as in `decode_chunks`; here the spatial VAE is first.

        Yields [1, t, h, w, C], evaluated.
        """
        size = micro_batch or self.config.micro_batch_size
        parts: Iterator[mx.array] = (self._encode_space(chunk, size) for chunk in chunks)
        if sequential_offload:
            parts = iter(list(parts))
            del self["spatial_vae"]
            mx.synchronize()  # GPUs free buffers after the work that used them
            mx.clear_cache()
        return map(self._encode_time, parts)

    def _encode_space(self, frames: mx.array, micro_batch: int | None) -> mx.array:
        """Return the spatial latents of a chunk's frames, [f, h, w, C], evaluated."""
        moments = _in_batches(
            partial(self._run, self.spatial_vae, self.spatial_vae.encode), frames, micro_batch
        )
        z = Posterior.from_moments(moments).mean * LATENT_FACTOR
        mx.eval(z)
        return z

    def _encode_time(self, z: mx.array) -> mx.array:
        mean = Posterior.from_moments(
            self._run(self.temporal_vae, self.temporal_vae.encode, z[None])
        ).mean
        out = (mean - self.shift) / self.scale
        mx.eval(out)
        return out

    def _run(
        self, network: nn.Module, function: Callable[[mx.array], mx.array], x: mx.array
    ) -> mx.array:
        """Return float32 function(x), computed with `network` in this VAE's type."""
        if self.dtype != precision.LATENTS:
            # Else weights would be in memory as stored, too, beside the activations.
            mx.eval(network.parameters())
        return function(x.astype(self.dtype)).astype(precision.LATENTS)


def _in_batches(
    network: Callable[[mx.array], mx.array], frames: mx.array, size: int | None
) -> mx.array:
    """Apply `network` in batches along the first axis; evaluate each before the next."""
    size = size or frames.shape[0]
    parts = []
    for start in range(0, frames.shape[0], size):
        parts.append(network(frames[start : start + size]))
        mx.eval(parts[-1])
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    mx.eval(out)
    return out


def _nest_rules(rules: Sequence[KeyRule], stored: str, path: str) -> tuple[KeyRule, ...]:
    """Extend a network's rules by prefixes: `stored` of checkpoint names, `path` of parameters."""
    stored = re.escape(stored)
    nested = [
        replace(rule, pattern=f"{stored}({rule.pattern})", target=rf"{path}\1")
        if rule.target is None
        else replace(rule, pattern=f"{stored}(?:{rule.pattern})", target=path + rule.target)
        for rule in rules
    ]
    return (*nested, KeyRule(rf"{stored}(.*)", rf"{path}\1"))


#: Statistics of the latents.
_CONSTANTS = frozenset({"scale", "shift"})

_MODULES = {"encoder": "(encoder|quant_conv)", "decoder": "(decoder|post_quant_conv)"}


def key_map(networks: Sequence[str] = NETWORKS) -> KeyMap:
    """Return the key map of a VideoVAE with `networks`; it ignores tensors of the other one."""
    unused = [module for network, module in _MODULES.items() if network not in networks]
    prefix = r"(spatial_vae\.module|temporal_vae)\."
    return KeyMap(
        rules=(
            *(KeyRule(rf"{prefix}{module}\..*", ignore=True) for module in unused),
            KeyRule(r"scale|shift", flatten=True),
            *_nest_rules(vae_spatial.RULES, "spatial_vae.module.", "spatial_vae."),
            *_nest_rules(vae_temporal.RULES, "temporal_vae.", "temporal_vae."),
        ),
        # config.json holds both, too.
        optional=_CONSTANTS,
        float32=_CONSTANTS,
    )


KEYS = key_map()
