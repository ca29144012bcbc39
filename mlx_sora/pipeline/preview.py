"""Previews: x0 as predicted in a step, shown beside the output while the run denoises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.errors import MlxSoraError, UsageError, WeightsError
from mlx_sora.geometry import MICRO_FRAME_SIZE
from mlx_sora.loading.file_guard import WeightFileGuard
from mlx_sora.loading.networks import load_vae
from mlx_sora.loading.preview_map import load_preview_map, preview_command
from mlx_sora.memory.budget import is_automatic
from mlx_sora.models.preview_map import PreviewMap
from mlx_sora.models.vae import chunk_plan
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.settings import ResolvedRequest
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.device import to_numpy
from mlx_sora.runtime.events import Event, PreviewReady, Warned
from mlx_sora.video.frames import FramesInMemory, to_uint8
from mlx_sora.video.preview import (
    PREVIEW_FILE,
    enlarge,
    preview_path,
    preview_scale,
    write_preview,
)

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Previews:
    """Previews after every `every` steps, through `map`, or the VAE if it is None.

    keep: each stays, in a file of its own; else the newest is there until the run ends.
    """

    every: int
    engine: Engine
    settings: ResolvedRequest
    output: Path | None
    map: PreviewMap | None
    keep: bool = False
    _written: list[Path] = field(default_factory=list)

    @classmethod
    def from_request(
        cls,
        request: GenerationRequest,
        engine: Engine,
        settings: ResolvedRequest,
        output: Path | None,
    ) -> Previews | None:
        """Return the previews of a request, or None.

        Raises UsageError if they need the VAE and a memory budget was given.
        """
        if request.preview_every is None:
            return None
        model = engine.model
        found = load_preview_map(model, engine.transformer_config.in_channels)
        given = not is_automatic(request.memory_budget, request.device_profile)
        if found is None and given and settings.memory_budget is not None:
            raise UsageError(
                f"{model.name} has no {PREVIEW_FILE}, and for previews the VAE would be in memory "
                "beside the transformer, which no memory budget counts.",
                "Leave out --preview-every, set --memory-budget off, or fit a map: "
                + preview_command(model),
            )
        return cls(request.preview_every, engine, settings, output, found, request.keep_previews)

    def after(self, clip: int, index: int, x0: mx.array) -> Iterator[Event]:
        """Write the preview of x0 [1, T, h, w, C], predicted in step `index`, if one is due."""
        number = index + 1 - self.settings.first_step
        if number % self.every:
            return
        try:
            frames, fps = self._frames(x0)
        except WeightsError as error:
            yield Warned(f"No preview of step {number}: {error}")
            return
        path = None
        if self.output is not None:
            path = self._path(clip, number)
            place = f"{self._place(clip)}step {number} of {self.settings.steps_to_make}"
            try:
                write_preview(path, frames, fps, place)
                self._written.append(path)
            except (MlxSoraError, OSError) as error:
                yield Warned(f"No preview of step {number}: {error}")
                path = None
        yield PreviewReady(number - 1, frames, None if path is None else str(path))

    def notes(self) -> tuple[str, ...]:
        """Return the line that announces the files."""
        if self.output is None:
            return ()
        path = self._path(0, self.every)
        until = "" if self.keep else "; removed when the video is finished"
        return (f"previews every {self.every} steps: {path}{until}",)

    def remove(self) -> None:
        """Remove the last preview, unless previews stay."""
        if self._written and not self.keep:
            with suppress(OSError):
                self._written[-1].unlink()

    def _path(self, clip: int, number: int) -> Path:
        assert self.output is not None, "previews have a file only beside one"
        place = f"{self._place(clip)}step {number}" if self.keep else ""
        return preview_path(self.output, self.settings.geometry.num_frames, place.replace(" ", "-"))

    def _place(self, clip: int) -> str:
        place = f"clip {clip + 1} " if self.settings.clips.count > 1 else ""
        return place if self.settings.second_pass is None else f"{place}pass 2 "

    def _frames(self, x0: mx.array) -> tuple[np.ndarray, float]:
        """Return frames uint8 [F, H, W, 3] and their number per second."""
        count = self.settings.clips.num_frames
        if self.map is not None:
            return map_latents(self.map, x0[0], count), self.settings.fps * x0.shape[1] / count
        kept = FramesInMemory()
        with WeightFileGuard(self.engine.model.vae).check_reads():
            vae = load_vae(self.engine.model, dtype=self.engine.precision.vae)
            for chunk in vae.decode_chunks(x0, count, tiles=self.settings.vae_tiles):
                kept.write(to_uint8(chunk))
        return kept.frames, self.settings.fps


def map_latents(found: PreviewMap, z: mx.array, num_frames: int) -> np.ndarray:
    """Return a picture for each of the latents [T, h, w, C], uint8 [T, H, W, 3]."""
    scale = preview_scale(*z.shape[1:3])
    side = gcd(found.patch, scale)
    chunks = chunk_plan(num_frames, MICRO_FRAME_SIZE)
    rgb = found(z.astype(mx.float32), chunks, side)
    return enlarge(to_numpy(mx.round(rgb * 255).astype(mx.uint8)), scale // side)
