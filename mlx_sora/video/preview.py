"""Previews of a run: their files beside the output, and their size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_sora.errors import UsageError
from mlx_sora.utils.files import atomic_write
from mlx_sora.video.encoders import AnimationEncoder, save_png
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.output_path import is_sequence, sequence_stem

if TYPE_CHECKING:
    import numpy as np

#: File of a model folder with its map from latents to pictures.
PREVIEW_FILE = "preview.json"

#: Longer side of a preview in pixels, and pixels per latent, at most.
MAX_SIDE, SCALE = 256, 8


def preview_scale(height: int, width: int) -> int:
    """Return the pixels per latent of the preview of `height` x `width` latents, 1, 2, 4 or 8."""
    most = max(1, MAX_SIDE // max(height, width))
    return min(SCALE, 1 << most.bit_length() - 1)


def enlarge(pictures: np.ndarray, factor: int) -> np.ndarray:
    """Return uint8 [T, H, W, 3] with `factor` times as many pixels per side."""
    import numpy as np
    from PIL import Image

    size = (pictures.shape[2] * factor, pictures.shape[1] * factor)
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(p).resize(size, bilinear)) for p in pictures])


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
