"""How well videos are inverted and edited by the bundled model.

    python -m benchmarks.editing [--cases 48] [--clips 12] [--json FILE]

Inversion: clips drawn for held-out captions are inverted and made again under their own caption,
without guidance, by samplers with the same number of evaluations; PSNR compares with what the VAE
alone gives back. Editing: the colour word of the caption is exchanged; a video is right when the
scorer sees the new colour and the old shape and motion, and overlap says how much of the shape lies
where it did, frame by frame (intersection over union). For comparison, new videos of the changed
captions, from seeds; and other numbers of steps that share values. Cases are edited side by side,
one of them also by `Pipeline.edit`, to the same outcome.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.ondevice import psnr
from benchmarks.shapes import world
from benchmarks.shapes.scorer import FIELDS, FOREGROUND_DISTANCE, read_video
from mlx_sora import Pipeline, Video
from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.value_sharing import CapturedValues
from mlx_sora.geometry import Size, model_arguments
from mlx_sora.loading.networks import load_text_encoder, load_transformer, load_vae
from mlx_sora.models.hooks import Unsharded, ValueSharing
from mlx_sora.pipeline.networks import ClipTransformer
from mlx_sora.request.edit import INJECT_STEPS, SAMPLER
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.guidance import Guidance
from mlx_sora.sampling.loop import denoise
from mlx_sora.text.encoder import encode_tokens
from mlx_sora.text.prompt import prepare_prompt
from mlx_sora.video.frames import to_uint8
from mlx_sora.video.reader import read_video as read_frames
from mlx_sora.video.writer import save_frames

#: The same number of evaluations each way.
INVERSIONS = (("midpoint", 30), ("ab2", 60), ("rflow", 60))

#: Steps of an edit's inversion, and of what follows it.
STEPS = 30

INJECTIONS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """A clip, what it shows, and the same in another colour."""

    clip: Path
    truth: world.Attributes
    asked: world.Attributes


@dataclass(frozen=True)
class Inversion:
    """dB to what the VAE gives back: over all clips, of the median clip and of the worst."""

    sampler: str
    steps: int
    evaluations: int
    psnr: float | None
    psnr_median: float
    psnr_worst: float


@dataclass(frozen=True)
class Edit:
    """Shares of cases by attribute as asked (colour) or as before, and right in colour, shape and
    motion; mean overlap of the shape with the source's.
    """

    row: str
    cases: int
    colour: float
    background: float
    motion: float
    shape: float
    right: float
    overlap: float


def cases(folder: Path, count: int) -> list[Case]:
    """Held-out captions drawn as clips; colours that the background does not have."""
    rng = np.random.default_rng(5)
    found = []
    for number, truth in enumerate(world.split()[1][:count]):
        path = world.random_path(truth.motion, rng)
        frames = world.render(truth, path, np.linspace(0, 1, world.CHUNK))
        others = [c for c in world.COLOURS if c not in (truth.colour, truth.background)]
        asked = replace(truth, colour=others[rng.integers(len(others))])
        clip = save_frames(folder / f"{number}.mp4", frames, world.FPS, None, False)
        found.append(Case(clip, truth, asked))
    return found


def edited(pipe: Pipeline, case: Case, asked: world.Attributes, **options: Any) -> np.ndarray:
    """The case's clip changed to `asked`."""
    source, target = world.caption(case.truth), world.caption(asked)
    return frames_of(pipe.edit(case.clip, source_prompt=source, prompt=target, **options))


def frames_of(video: Video) -> np.ndarray:
    assert video.frames is not None, "no output was asked for"
    return video.frames


def inversions(pipe: Pipeline, chosen: Sequence[Case]) -> Iterator[Inversion]:
    """Back and forth with each sampler."""
    kept = [through_vae(pipe, read_frames(case.clip).frames) for case in chosen]
    for sampler, steps in INVERSIONS:
        options = {"sampler": sampler, "steps": steps, "guidance": 1.0, "inject_steps": 0}
        errors = []
        for case, frames in zip(chosen, kept, strict=True):
            again = edited(pipe, case, case.truth, **options).astype(np.float64)
            errors.append(float(np.mean((again - frames) ** 2)))
        median, worst = psnr(statistics.median(errors)), psnr(max(errors))
        assert median is not None
        assert worst is not None
        evaluations = steps * (2 if sampler == "midpoint" else 1)
        total = psnr(statistics.mean(errors))
        yield Inversion(sampler, steps, evaluations, total, median, worst)


def through_vae(pipe: Pipeline, frames: np.ndarray) -> np.ndarray:
    """What encoding and decoding alone leave of a clip."""
    vae = load_vae(pipe.model, ("encoder", "decoder"))
    latents = vae.encode(mx.array(frames)[None].astype(mx.float32) / 127.5 - 1)
    return np.concatenate([to_uint8(part) for part in vae.decode_chunks(latents, len(frames))])


def edits(pipe: Pipeline, chosen: Sequence[Case]) -> Iterator[Edit]:
    """New videos, then edits: one way back for all cases, a way forth for each row."""
    seeded = [
        frames_of(pipe(world.caption(case.asked), seed=number, steps=STEPS))
        for number, case in enumerate(chosen)
    ]
    yield tally("new video, no source", chosen, seeded)
    batch = Batch(pipe, chosen)
    kept = CapturedValues()
    noise = batch.back(kept)
    for inject in INJECTIONS:
        videos = batch.forth(noise, kept, inject)
        if inject == INJECT_STEPS:
            alone = edited(pipe, chosen[0], chosen[0].asked, steps=STEPS).astype(np.float64)
            found = psnr(float(np.mean((alone - videos[0]) ** 2)))
            assert found is None or found > 45, "a batch edits as the pipeline does"
        yield tally(f"edit, values shared in {inject} steps", chosen, videos)


class Batch:
    """Edits of many clips at once, out of the parts that `Pipeline.edit` is made of."""

    def __init__(self, pipe: Pipeline, chosen: Sequence[Case]) -> None:
        self._network = load_transformer(pipe.model, mx.float32)
        self._vae = load_vae(pipe.model, ("encoder", "decoder"))
        network, rows = load_text_encoder(pipe.model, mx.float32)

        def encode(caption: str) -> mx.array:
            ids = pipe.engine.tokenizer.encode(prepare_prompt(caption).text()).ids
            return encode_tokens(network, rows, ids, mx.float32)

        self._texts = {
            name: [encode(world.caption(getattr(case, name))) for case in chosen]
            for name in ("truth", "asked")
        }
        self._clips = [read_frames(case.clip).frames for case in chosen]
        self._sampler = SAMPLERS[SAMPLER]
        side, frames = world.SIZE, world.CHUNK
        self._times = self._sampler.timesteps(STEPS, height=side, width=side, num_frames=frames)
        self._guidance = pipe.model.defaults.guidance

    def back(self, kept: CapturedValues) -> mx.array:
        """The noise of all clips; keeps values of as many steps as any row shares."""
        z = mx.concatenate(
            [
                self._vae.encode(mx.array(c)[None].astype(mx.float32) / 127.5 - 1)
                for c in self._clips
            ]
        )

        def values(index: int, t: float) -> ValueSharing | None:
            return kept.capture(t) if STEPS - 1 - index < max(INJECTIONS) else None

        return self._follow(z, "truth", values, self._times[::-1], 1.0)

    def forth(self, noise: mx.array, kept: CapturedValues, inject: int) -> list[np.ndarray]:
        """The clips under the new captions, values shared in `inject` steps."""

        def values(index: int, t: float) -> ValueSharing | None:
            return kept.reuse(t) if index < inject else None

        z = self._follow(noise, "asked", values, self._times, self._guidance)
        return [
            np.concatenate(
                [to_uint8(part) for part in self._vae.decode_chunks(one[None], world.CHUNK)]
            )
            for one in z
        ]

    def _follow(
        self,
        z: mx.array,
        caption: str,
        values: Callable[[int, float], ValueSharing | None],
        times: mx.array,
        scale: float,
    ) -> mx.array:
        model = ClipTransformer(
            (self._network, None),
            model_arguments(Size(world.SIZE, world.SIZE), world.CHUNK, world.FPS),
            z.shape[1:4],
            Accelerations({}, ScheduleInfo(len(times) - 1, 1, z.shape[1])),
            Unsharded(),
            values,
        )
        velocity = Guidance(model, self._texts[caption], self._network.null_text, scale)
        *_, last = denoise(velocity, z, times, self._sampler)
        return last.z


def tally(row: str, chosen: Sequence[Case], videos: Sequence[np.ndarray]) -> Edit:
    readings = [read_video(video) for video in videos]
    hits = {
        name: [
            getattr(reading, name) == getattr(case.asked, name)
            for reading, case in zip(readings, chosen, strict=True)
        ]
        for name in FIELDS
    }
    right = list(map(all, zip(hits["colour"], hits["shape"], hits["motion"], strict=True)))
    overlaps = [
        overlap(video, read_frames(case.clip).frames)
        for video, case in zip(videos, chosen, strict=True)
    ]
    shares = {name: statistics.mean(values) for name, values in hits.items()}
    return Edit(
        row=row,
        cases=len(chosen),
        right=statistics.mean(right),
        overlap=statistics.mean(overlaps),
        **shares,
    )


def overlap(video: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of the shapes' pixels in two clips."""
    a, b = shape_pixels(video), shape_pixels(other)
    return float((a & b).sum() / max(1, (a | b).sum()))


def shape_pixels(video: np.ndarray) -> np.ndarray:
    """Pixels [F, H, W] that are not like the border."""
    frames = video.astype(np.float32)
    edges = (frames[:, :2], frames[:, -2:], frames[:, :, :2], frames[:, :, -2:])
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    pixels: np.ndarray = np.linalg.norm(frames - ground, axis=-1) > FOREGROUND_DISTANCE
    return pixels


def show_inversions(rows: Sequence[Inversion]) -> str:
    return markdown(
        ["sampler", "steps", "evaluations each way", "PSNR", "median clip", "worst clip"],
        [
            [
                row.sampler,
                str(row.steps),
                str(row.evaluations),
                "–" if row.psnr is None else f"{row.psnr:.1f}",
                f"{row.psnr_median:.1f}",
                f"{row.psnr_worst:.1f}",
            ]
            for row in rows
        ],
    )


def show_edits(rows: Sequence[Edit]) -> str:
    shares = ("colour", "shape", "motion", "background", "right")
    return markdown(
        ["", "cases", *shares, "overlap"],
        [
            [
                row.row,
                str(row.cases),
                *(f"{getattr(row, name):.0%}" for name in shares),
                f"{row.overlap:.2f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=48, help="default 48, at most 96")
    parser.add_argument("--clips", type=int, default=12, help="to invert; default 12")
    parser.add_argument("--json", type=Path, default=RESULTS / "editing.json")
    asked = parser.parse_args()
    pipe = Pipeline.from_pretrained("shapes")
    with tempfile.TemporaryDirectory() as folder:
        chosen = cases(Path(folder), asked.cases)
        inverted, changed = [], []
        for inversion in inversions(pipe, chosen[: asked.clips]):
            inverted.append(inversion)
            print(inversion, flush=True)
        for edit in edits(pipe, chosen):
            changed.append(edit)
            print(edit, flush=True)
    print(show_inversions(inverted))
    print(show_edits(changed))
    result = {
        "steps": STEPS,
        "inversion": [asdict(row) for row in inverted],
        "editing": [asdict(row) for row in changed],
    }
    write_json(asked.json, result)


if __name__ == "__main__":
    main()
