"""Latent previews: a linear map from latents to small images, fitted to the VAE.

Each position sees its 3 x 3 neighbours. Latents of a single frame have their own map. The map is a
JSON file in the model folder: "weights" [2][9 * C + 1][3] to RGB in [0, 1], the last row is the
bias; "psnr" in dB against the VAE's frames of clips that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.utils.files import atomic_write
from mlx_sora.utils.json import read_object
from mlx_sora.video.encoders import AnimationEncoder, save_png
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.output_path import is_sequence, sequence_stem

if TYPE_CHECKING:
    import numpy as np

PREVIEW_FILE = "preview.json"

#: Longer side of a preview in pixels, and pixels per latent, at most.
MAX_SIDE, SCALE = 256, 8


@dataclass(frozen=True)
class LatentToRGB:
    """Linear map from latents to RGB.

    weights: float32 [2, 9 * C + 1, 3], for latents of one frame and of several.
    """

    weights: np.ndarray
    psnr: float

    @classmethod
    def load(cls, model: Path, channels: int) -> LatentToRGB | None:
        """Load the map of a model folder for latents of C channels, or return None if it has none.

        Raises WeightsError for an invalid file.
        """
        import numpy as np

        file = model / PREVIEW_FILE
        if not file.is_file():
            return None
        try:
            found = read_object(file)
            weights, psnr = np.array(found["weights"], np.float32), float(found["psnr"])
            if weights.shape != (2, 9 * channels + 1, 3):
                raise ValueError(f"weights of shape {weights.shape}")
            if not np.isfinite(weights).all():
                raise ValueError("NaN or Inf in its weights")
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise WeightsError(f"{file} is not a preview map: {error}.", "Delete it.") from error
        return cls(weights, psnr)

    def decode(self, z: np.ndarray, single_frame: Sequence[bool]) -> np.ndarray:
        """Map latents [T, h, w, C] to enlarged images, uint8 [T, H, W, 3].

        single_frame: per latent, True if it encodes one frame.
        """
        import numpy as np
        from PIL import Image

        weights = self.weights[[0 if single else 1 for single in single_frame]]
        colours = np.einsum("thwf,tfc->thwc", neighbourhoods(z), weights)
        pictures = np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)
        height, width = z.shape[1:3]
        scale = min(SCALE, max(1, MAX_SIDE // max(height, width)))
        size = (width * scale, height * scale)
        enlarged = [Image.fromarray(p).resize(size, Image.Resampling.BILINEAR) for p in pictures]
        return np.stack([np.asarray(picture) for picture in enlarged])


def neighbourhoods(z: np.ndarray) -> np.ndarray:
    """Return each position with its neighbours and a 1: [T, h, w, C] to [T, h, w, 9 * C + 1]."""
    import numpy as np

    _, height, width, _ = z.shape
    padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.concatenate([*shifted, np.ones_like(z[..., :1])], axis=-1)


def preview_path(output: Path, num_frames: int, place: str = "") -> Path:
    """Return the path of a run's preview: beside its output, named after it.

    place: of a preview that stays, such as "step-10".
    """
    stem = sequence_stem(output) if is_sequence(output) else output.stem
    name = ".".join(filter(None, (stem, "preview", place)))
    return output.with_name(f"{name}.{'png' if num_frames == 1 else 'gif'}")


def refuse_other_file(path: Path) -> None:
    """Raise UsageError if `path` is a file, but no preview, which may be replaced and removed."""
    if not path.is_file():
        return
    try:
        if "preview" in read_metadata(path):
            return
    except UsageError:
        pass
    raise UsageError(
        f"{path} would be replaced by previews, and is none.", "Move it, or change --output."
    )


def write_preview(path: Path, frames: np.ndarray, fps: float, place: str) -> None:
    """Write uint8 [F, H, W, 3] as a gif, or as a png of one frame; replaces the last preview.

    place: such as "step 10 of 30", for the file's record. Raises MlxSoraError or OSError if it
    cannot be written, and UsageError in place of replacing another file.
    """
    path.parent.mkdir(exist_ok=True)  # a sequence of images makes its folder later
    refuse_other_file(path)
    record = {"preview": place}
    with atomic_write(path, overwrite=True) as file:
        if len(frames) == 1:
            save_png(frames[0], file.partial, record)
            return
        encoder = AnimationEncoder("gif", fps, fast=True)
        for frame in frames:
            encoder.add(frame)
        encoder.save(file.partial, record)
