"""The child behind `Helper`: it reads calls as lines of JSON, and writes its answers so."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import MlxSoraError
from mlx_sora.geometry import RESOLUTIONS, get_image_size
from mlx_sora.server.checks import source_id

if TYPE_CHECKING:
    from mlx_sora.pipeline.pipeline import Pipeline

#: Seconds without a call after which the process ends.
IDLE = 60.0

#: Longer side of a thumbnail, of a frame in a spritesheet, in pixels; frames in it, and in a row.
_THUMBNAIL, _TILE, _TILES, _ROW = 320, 160, 10, 5

_QUALITY = 80

#: Sizes and lengths to choose from where a model sets no limits: those of Open-Sora 1.2.
_SIZES = tuple(str(get_image_size(name)) for name in RESOLUTIONS)
_FRAMES = (1, 51, 102, 204, 408)


def serve() -> None:
    """Answer calls until standard input ends or nothing comes for a while."""
    calls: dict[str, Callable[..., dict[str, Any]]] = {
        "plan": Planner().plan,
        "models": models,
        "probe": probe,
        "record": record,
        "checkpoint": checkpoint,
        "thumbnail": thumbnail,
        "spritesheet": spritesheet,
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    while select.select([sys.stdin.buffer], [], [], IDLE)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            break
        answer = json.dumps(_answer(calls, json.loads(line)))
        try:
            answers.write(answer + "\n")
            answers.flush()
        except BrokenPipeError:  # the server was killed
            os._exit(0)


def _answer(
    calls: Mapping[str, Callable[..., dict[str, Any]]], arguments: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """Return the result of a call and None, or None and the error that it raised."""
    try:
        return calls[arguments.pop("call")](**arguments), None
    except MlxSoraError as error:
        kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "mlx_sora.errors")
        return None, {"type": kind, "message": error.message, "fix": error.fix}
    except Exception as error:
        message = f"{type(error).__name__}: {str(error)[:300]}"
        return None, {"type": "MlxSoraError", "message": message, "fix": ""}


class Planner:
    """Plans of tasks, with the models that are open already."""

    def __init__(self) -> None:
        self._pipelines: dict[tuple[str, str], Pipeline] = {}

    def plan(
        self, kind: str, options: Mapping[str, Any], paths: Mapping[str, str], output: str
    ) -> dict[str, Any]:
        """Return the plan of a task as PlanSummary has it.

        paths: files by the identifiers in the options. output: path without its suffix.
        """
        from mlx_sora.server.planning import plan_task

        model = options.get("model")
        key = str(model), str(options.get("dtype", "auto"))
        if key not in self._pipelines:
            self._pipelines[key] = _open(model, key[1])
        return plan_task(self._pipelines[key], kind, options, paths, output).to_dict()


def _open(model: str | None, dtype: str) -> Pipeline:
    from mlx_sora.errors import WeightsError
    from mlx_sora.loading.model_folder import find_model, model_names
    from mlx_sora.pipeline.pipeline import Pipeline

    if model is not None and model not in model_names():  # a path, which no client may open
        raise WeightsError(f"There is no model {model}.", "GET /v1/models lists them.")
    return Pipeline(find_model(model), dtype)


def models() -> dict[str, Any]:
    """Return the complete models of this machine, the default one first."""
    from dataclasses import asdict

    from mlx_sora.loading.model_folder import ModelFolder, model_names, model_path
    from mlx_sora.manage.models import default_fit

    found = []
    for name in model_names():
        path = model_path(name)
        with suppress(MlxSoraError):
            model = ModelFolder.open(path)
            created = int((path / "transformer" / "config.json").stat().st_mtime)
            defaults = asdict(model.defaults)
            facts = {"id": name, "name": model.name, "created": created, "defaults": defaults}
            card = model.card
            found.append(
                facts
                | {"description": card.guide(), "examples": card.prompts}
                | {"sizes": card.sizes or _SIZES, "frames": card.num_frames or _FRAMES}
                | {"fits": default_fit(model).fits}
            )
    return {"models": found}


def probe(path: str) -> dict[str, Any]:
    """Return kind, size, frames, fps, and the recorded options of a picture or video."""
    from mlx_sora.video.reader import image_size, is_video, probe_video

    if not is_video(path):
        size = image_size(path)
        found: dict[str, Any] = {"kind": "image", "frames": 1, "fps": None}
    else:
        info = probe_video(path)
        size = info.size
        found = {"kind": "video", "frames": info.num_frames, "fps": round(info.fps, 3)}
    found |= {"width": size.width, "height": size.height, "request": None}
    with suppress(MlxSoraError):
        found["request"] = _recorded(path)
    return found


def _recorded(path: str) -> dict[str, Any]:
    """Return the options in the record of a file; those of an edit have its `video`, too."""
    from mlx_sora.request.generation import options_of
    from mlx_sora.request.options import ImageReference, VideoReference
    from mlx_sora.video.metadata import read_metadata, replay_options

    found = read_metadata(path)
    edit = found.pop("edit", None)
    values = replay_options(found, path)
    if isinstance(edit, dict):
        values = {n: value for n, value in values.items() if n in options_of("edit")}
        values |= {n: edit.get(n) for n in ("source_prompt", "inject_steps")}
        values["video"] = source_id(str(edit.get("video")))
    for name, kind in (("images", ImageReference), ("videos", VideoReference)):
        if name in values:
            items = [list(kind(*item)) for item in values[name]]
            values[name] = [[source_id(str(item[0])), *item[1:]] for item in items]
    return {n: value for n, value in values.items() if value is not None}


def record(path: str) -> dict[str, Any]:
    """Return the whole record of a video."""
    from mlx_sora.video.metadata import read_metadata

    return {"record": read_metadata(path)}


def checkpoint(path: str) -> dict[str, Any]:
    """Return the options of the run that wrote a checkpoint."""
    from mlx_sora.pipeline.checkpoint import read_record

    found = read_record(Path(path))
    return {"request": found["request"], "model": found["identity"].get("model")}


def thumbnail(path: str, target: str) -> dict[str, Any]:
    """Write the first frame, small, as webp."""
    _save(_frames(path, _THUMBNAIL, 1)[0], target)
    return {}


def spritesheet(path: str, target: str) -> dict[str, Any]:
    """Write frames from the whole video, in rows, as jpeg."""
    import numpy as np

    frames = _frames(path, _TILE, None)
    count = min(_TILES, len(frames))
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    across = min(_ROW, count)
    missing = -count % across
    height, width = chosen.shape[1:3]
    blank = np.zeros((missing, height, width, 3), np.uint8)
    tiles = np.concatenate([chosen, blank]).reshape(-1, across, height, width, 3)
    _save(tiles.transpose(0, 2, 1, 3, 4).reshape(-1, across * width, 3), target)
    return {}


def _frames(path: str, side: int, limit: int | None) -> Any:
    """Return frames uint8 [F, H, W, 3] whose longer side is `side` at most."""
    from mlx_sora.geometry import Size
    from mlx_sora.video.reader import image_size, is_video, probe_video, read_image, read_video

    moving = is_video(path)
    info = probe_video(path) if moving else None
    size = image_size(path) if info is None else info.size
    scale = min(1.0, side / max(size))
    small = Size(max(1, round(size.width * scale)), max(1, round(size.height * scale)))
    if info is None:
        return read_image(path, small)[None]
    return read_video(path, limit, size=small, info=info).frames


def _save(pixels: Any, target: str) -> None:
    from PIL import Image

    from mlx_sora.utils.files import atomic_write

    path = Path(target)
    with atomic_write(path, overwrite=True) as file:
        kind = "JPEG" if path.suffix == ".jpg" else "WEBP"
        Image.fromarray(pixels).save(file.partial, kind, quality=_QUALITY)


if __name__ == "__main__":
    serve()
