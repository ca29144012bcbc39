"""Latents as small pictures, without the VAE: a linear map that was fitted to it.

Each place sees its 3 x 3 neighbours; latents that stand for one frame have a map of their own. The
map is a JSON file in the model's folder: "weights" [2][9 * C + 1][3] to RGB in [0, 1], the last row
added to all; "psnr" in dB to what the VAE decodes, of clips that it was not fitted to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import WeightsError
from mlx_sora.utils.files import atomic_write
from mlx_sora.video.encoders import AnimationEncoder, save_png

if TYPE_CHECKING:
    import numpy as np

PREVIEW_FILE = "preview.json"

#: Longer side of a preview in pixels, and pixels per latent, at most.
MAX_SIDE, SCALE = 256, 8


@dataclass(frozen=True)
class LatentToRGB:
    """weights: float32 [2, 9 * C + 1, 3], for latents of one frame and of several."""

    weights: np.ndarray
    psnr: float

    @classmethod
    def load(cls, model: Path, channels: int) -> LatentToRGB | None:
        """That of a model folder for latents of C channels; None where there is none.

        Raises WeightsError for a file that is none.
        """
        import numpy as np

        file = model / PREVIEW_FILE
        if not file.is_file():
            return None
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            made = cls(np.array(found["weights"], np.float32), float(found["psnr"]))
            if made.weights.shape != (2, 9 * channels + 1, 3):
                raise ValueError(f"weights of shape {made.weights.shape}")
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise WeightsError(f"{file} is no map for previews: {error}.", "Delete it.") from error
        return made

    def decode(self, z: np.ndarray, single_frame: Sequence[bool]) -> np.ndarray:
        """Latents [T, h, w, C], enlarged: uint8 [T, H, W, 3]. alone: which stand for one frame."""
        import numpy as np
        from PIL import Image

        kinds = self.weights[[0 if one else 1 for one in single_frame]]
        colours = np.einsum("thwf,tfc->thwc", neighbourhoods(z), kinds)
        pictures = np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)
        height, width = z.shape[1:3]
        scale = min(SCALE, max(1, MAX_SIDE // max(height, width)))
        size = (width * scale, height * scale)
        enlarged = [Image.fromarray(p).resize(size, Image.Resampling.BILINEAR) for p in pictures]
        return np.stack([np.asarray(picture) for picture in enlarged])


def neighbourhoods(z: np.ndarray) -> np.ndarray:
    """Each place with those around it, and 1: [T, h, w, C] to [T, h, w, 9 * C + 1]."""
    import numpy as np

    _, height, width, _ = z.shape
    padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.concatenate([*shifted, np.ones_like(z[..., :1])], axis=-1)


def preview_path(output: Path, num_frames: int) -> Path:
    """Where the preview of a run that writes `output` is: beside it, under its whole name."""
    return output.with_name(f"{output.name}.preview.{'png' if num_frames == 1 else 'gif'}")


def write_preview(path: Path, frames: np.ndarray, fps: float) -> None:
    """uint8 [F, H, W, 3] as a gif, or a png of one frame, in place of the preview before.

    Raises MlxSoraError or OSError where that cannot be written.
    """
    path.parent.mkdir(exist_ok=True)  # that of a sequence of pictures
    with atomic_write(path, overwrite=True) as file:
        if len(frames) == 1:
            save_png(frames[0], file.partial, None)
            return
        encoder = AnimationEncoder("gif", fps)
        for frame in frames:
            encoder.add(frame)
        encoder.save(file.partial, None)
