"""PreviewMap: a small network from latents to pictures, in place of the VAE, for previews.

Each place sees its 3 x 3 neighbours, and mean and deviation of its latent frame and of its chunk:
the group norms of the VAE see those, too. A few dense layers make a patch of pixels of that.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_sora.models.vae import Chunk
from mlx_sora.utils.json import as_number

#: Dense layers [in, out] and [out]; silu between them.
Layers = tuple[tuple[mx.array, mx.array], ...]


@dataclass(frozen=True)
class PreviewMap:
    """Map from latents to RGB.

    networks: one for all latents, or one for latents of a single frame and one for those of
    several. psnr: in dB to the VAE's frames, on clips that the map was not fitted to. vae: numbers
    of the VAE that it was fitted to; None in maps of earlier versions.
    """

    networks: tuple[Layers, ...]
    psnr: float
    vae: tuple[float, ...] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], channels: int) -> PreviewMap:
        """Return the map of `to_dict`, or the linear one of an earlier version.

        Raises ValueError, TypeError or LookupError for other values.
        """
        psnr = as_number(values["psnr"])
        if "weights" in values:
            weights = np.array(values["weights"], np.float32)
            found = cls(tuple(_linear_layers(each, channels) for each in weights), psnr)
        else:
            layers = tuple((_array(w), _array(b)) for w, b in values["layers"])
            found = cls((layers,), psnr, tuple(map(as_number, values["vae"])))
        found._check(channels)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        assert self.vae is not None, "maps that are written were fitted"
        layers = [[_values(weight), _values(bias)] for weight, bias in self.networks[0]]
        return {"psnr": round(self.psnr, 1), "vae": list(self.vae), "layers": layers}

    @property
    def patch(self) -> int:
        """Pixels per side of what one latent becomes."""
        return isqrt(self.networks[0][-1][1].size // 3)

    def __call__(self, z: mx.array, chunks: Sequence[Chunk], side: int) -> mx.array:
        """Map latents [T, h, w, C] to RGB in [0, 1], [T, h * side, w * side, 3].

        side: pixels per latent; divides `patch`, whose pixels are averaged.
        """
        x = preview_features(z, chunks)
        found = [apply_layers(_averaged(layers, self.patch, side), x) for layers in self.networks]
        rgb = found[0] if len(found) == 1 else mx.where(x[..., -1:] == 1, *found)
        frames, height, width, _ = z.shape
        rgb = rgb.reshape(frames, height, width, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
        return mx.clip(rgb.reshape(frames, height * side, width * side, 3), 0, 1)

    def _check(self, channels: int) -> None:
        """Raise ValueError unless the layers fit to each other and to the latents."""
        size = feature_size(channels)
        for layers in self.networks:
            width = size
            for weight, bias in layers:
                if weight.shape != (width, bias.size) or bias.ndim != 1:
                    raise ValueError(f"a layer of shape {list(weight.shape)}")
                if not mx.isfinite(weight).all() or not mx.isfinite(bias).all():
                    raise ValueError("NaN or Inf in its weights")
                width = bias.size
            if width != 3 * self.patch**2 or not width:
                raise ValueError(f"patches of {width} values")


def feature_size(channels: int) -> int:
    """Return the number of features of a place: neighbours, statistics, kind."""
    return 13 * channels + 1


def preview_features(z: mx.array, chunks: Sequence[Chunk]) -> mx.array:
    """Return what the map sees of each place of latents [T, h, w, C]: [T, h, w, 13 * C + 1].

    Last is 1 for latents that stand for a single frame, the first of most chunks.
    """
    frames, height, width, _ = z.shape
    padded = mx.pad(z, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    parts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    spans = [slice(chunk.latent, chunk.latent + chunk.latents) for chunk in chunks]
    for axes in ((1, 2), (0, 1, 2)):
        for statistic in (mx.mean, mx.std):
            rows = [
                mx.broadcast_to(statistic(z[span], axes, keepdims=True), z[span].shape)
                for span in spans
            ]
            parts.append(mx.concatenate(rows))
    kinds = np.zeros((frames, 1, 1, 1), np.float32)
    for chunk in chunks:
        kinds[chunk.latent] = chunk.frames % 4 == 1
    parts.append(mx.broadcast_to(mx.array(kinds), (frames, height, width, 1)))
    return mx.concatenate(parts, axis=-1)


def apply_layers(layers: Layers, x: mx.array) -> mx.array:
    """Apply layers to features [.., n], with silu between them."""
    for index, (weight, bias) in enumerate(layers):
        x = (nn.silu(x) if index else x) @ weight + bias
    return x


def _averaged(layers: Layers, patch: int, side: int) -> Layers:
    """Return the layers with a last one that makes patches of `side` pixels per side."""
    if side == patch:
        return layers
    part = patch // side
    last = [
        value.reshape(-1, side, part, side, part, 3).mean(axis=(2, 4)).reshape(-1, 3 * side**2)
        for value in layers[-1]
    ]
    return (*layers[:-1], (last[0], last[1][0]))


def _linear_layers(weights: np.ndarray, channels: int) -> Layers:
    """Return a linear map [9 * C + 1, 3] of neighbours and a 1 as a layer."""
    if weights.shape != (9 * channels + 1, 3):
        raise ValueError(f"weights of shape {weights.shape}")
    padding = np.zeros((feature_size(channels) - 9 * channels, 3), np.float32)
    return ((mx.array(np.concatenate([weights[:-1], padding])), mx.array(weights[-1])),)


def _array(values: Mapping[str, Any]) -> mx.array:
    data = np.frombuffer(b64decode(values["float16"], validate=True), "<f2")
    return mx.array(data.reshape(values["shape"]).astype(np.float32))


def _values(array: mx.array) -> dict[str, Any]:
    data = np.array(array, dtype="<f2")
    return {"shape": list(data.shape), "float16": b64encode(data.tobytes()).decode()}
