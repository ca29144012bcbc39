"""Run on every rank: videos of the bundled model made together, against the same made alone.

Writes a JSON object: case to the largest difference of the latents after any step, in standard
deviations, whether the accelerations did alike, and how far the first rank's frames are apart.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
import numpy as np

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.runtime.events import Finished, Noted, StageFinished, StepFinished
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.video import Video

SMALL = {"prompt": "a red circle", "seed": 3, "steps": 4, "width": 32, "height": 32}
SMALL |= {"num_frames": 17}

#: What is asked for besides: every technique, and whatever changes what an evaluation looks like.
CASES: dict[str, dict[str, Any]] = {
    "two chunks and a half": {"num_frames": 40, "steps": 1},
    "no guidance": {"guidance": 1, "num_frames": 1},
    "midpoint": {"sampler": "midpoint", "steps": 2, "negative_prompt": "a text of another length"},
    "leap": {"lpl": "adaptive:patience=1,tolerance=2", "tdtm": 2, "sequential_guidance": True},
    "caches": {
        "step_cache": "every:2,warmup=1,order=1",
        "guidance_cache": "every:3,after=0",
        "guidance_interval": "30,900",
        "sampler": "ab2",
        "ci_dl": True,
    },
    "online": {"step_cache": "online:warmup=2,threshold=9"},
    "clips": {"loop": 2, "num_frames": 34, "steps": 1},
}

#: Those whose frames are looked at, too.
DECODED = ("two chunks and a half", "clips")


@dataclass(frozen=True)
class Made:
    """The latents after each step, and what came of them."""

    latents: list[np.ndarray]
    done: list[str]
    video: Video | None = None

    @classmethod
    def of(cls, pipe: Pipeline, options: dict[str, Any], decoded: bool, steps: int = 99) -> Made:
        """decoded: to the end; else at most `steps` steps of it."""
        latents, done = [], []
        run = pipe.stream(GenerationRequest.from_dict(SMALL | options))
        for event in run:
            if isinstance(event, StepFinished):
                latents.append(np.array(event.latents))
            if isinstance(event, Noted):
                done.append(event.message)
            if isinstance(event, Finished):
                return cls(latents, done, event.video)
            over = isinstance(event, StageFinished) and event.stage == "denoise"
            if not decoded and (over or len(latents) == steps):
                run.close()
        return cls(latents, done)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / a.std())


def compare(alone: Made, together: Made) -> dict[str, Any]:
    pairs = zip(alone.latents, together.latents, strict=True)
    found: dict[str, Any] = {
        "difference": max(difference(a, b) for a, b in pairs),
        "done alike": alone.done == together.done,
    }
    if alone.video is not None and together.video is not None:
        one, other = alone.video.frames, together.video.frames
        if one is not None and other is not None:
            found["frames"] = int(np.abs(one.astype(int) - other).max())
        found["parallel"] = together.video.metadata["parallel"]
    return found


def resumed(pipe: Pipeline, folder: Path, *, first_together: bool) -> dict[str, Any]:
    """A run that two ranks begin and one process ends, or the other way round."""
    options = {"steps": 4, "step_cache": "every:2,warmup=2,order=1", "sampler": "ab2"}
    output = folder / f"{first_together}.mp4"
    kept = options | {"checkpoint_every": 1, "output": str(output)}
    whole = Made.of(pipe, options | {"parallel": "off"}, False)
    left = Made([], [])
    for together in (first_together, not first_together):
        mode = {"parallel": "sequence" if together else "off"}
        if together or pipe.ranks.first:
            left = Made.of(pipe, kept | mode, False, 3 if together == first_together else 99)
        pipe.ranks.of_first(None)  # the others wait
    return {
        "steps": len(left.latents),
        "difference": difference(whole.latents[-1], left.latents[-1]) if left.latents else None,
    }


def failing(pipe: Pipeline) -> dict[str, Any]:
    """What all ranks raise where the second fails."""
    try:
        with pipe.ranks.together():
            if not pipe.ranks.first:
                raise UsageError("It went wrong.", "Mend it.")
    except UsageError as error:
        return {"message": str(error)}
    return {}


def main(folder: Path) -> None:
    # Read once: it is most of what such small runs take.
    Tokenizer.load = cache(Tokenizer.load)  # type: ignore[method-assign]
    pipe = Pipeline.from_pretrained("shapes")
    found = {
        f"begun by {'two' if together else 'one'}": resumed(pipe, folder, first_together=together)
        for together in (True, False)
    }
    found["failing"] = failing(pipe)
    for name, options in CASES.items():
        decoded = name in DECODED
        alone = Made.of(pipe, options | {"parallel": "off"}, decoded)
        for mode in ("sequence", *(["guidance"] if options.get("guidance") != 1 else [])):
            together = Made.of(pipe, options | {"parallel": mode}, decoded)
            found[f"{name}, {mode}"] = compare(alone, together)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
