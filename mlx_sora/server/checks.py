"""Checks of a task before anything heavy is asked about it, and the command that carries it out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sora.errors import UsageError
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import GenerationRequest, to_command_line
from mlx_sora.request.techniques import MAX_STEPS, StepCache, Tdtm
from mlx_sora.server.task import EDIT, GENERATE, KINDS, Task
from mlx_sora.video.output_path import SUFFIXES

#: Formats that a client may ask for; a folder of pictures is none.
FORMATS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)

#: Options that the server decides, or that would name files of the machine.
RESERVED = (
    *("overwrite", "metadata", "checkpoint_every", "keep_previews"),
    *("parallel", "references", "mask_strategy"),
)

_SOURCE = re.compile(r"(file-|video_)[0-9a-z]{26}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

#: Checkpoints and previews in a run.
_PARTS = 10


@dataclass(frozen=True)
class Sources:
    """Files that a task names by identifiers. path: raises NotFoundError."""

    path: Callable[[str], Path]

    def check(self, task: Task) -> None:
        """Raise UsageError or NotFoundError for a source that is not there."""
        for id in source_ids(task):
            self.path(id)


def checked_task(task: Task) -> Task:
    """Return the task with its options converted, and a seed. Raises UsageError.

    Only names of models and identifiers of uploads and jobs pass: no path of a client is opened.
    """
    if task.kind not in KINDS:
        raise UsageError(f"unknown kind {str(task.kind)[:40]!r}.", f"Valid: {', '.join(KINDS)}.")
    options = {name: value for name, value in task.options.items() if value is not None}
    reserved = [name for name in RESERVED if name in options]
    if reserved:
        raise UsageError(f"The server decides about {reserved[0]}.", "Leave it out.")
    output = options.pop("output", None)
    if output is not None and output not in FORMATS:
        raise UsageError(
            f"unknown output format {str(output)[:40]!r}.", f"Valid: {', '.join(FORMATS)}."
        )
    if task.kind == GENERATE:
        request = GenerationRequest.from_dict(options).with_seed()
        request.validate()
        values = request.to_dict()
    else:
        video = options.pop("video", None)
        if video is None:
            raise UsageError(
                "video is missing.", "Name an upload (file-...) or a video (video_...)."
            )
        edit = EditRequest.from_options(video, options)
        edit.validate()
        request = edit.target
        own: dict[str, Any] = {"video": edit.video, "source_prompt": edit.source_prompt}
        own |= {"inject_steps": edit.inject_steps, "sampler": request.sampler}  # not the default
        values = request.to_dict() | own
    _check_names(request)
    values = {name: _plain(value) for name, value in values.items() if value is not None}
    checked = Task(task.kind, values if output is None else values | {"output": output})
    for id in source_ids(checked):
        if not _SOURCE.fullmatch(id):
            raise UsageError(
                f"{id[:60]!r} is no file of the server.",
                "Send it to /v1/files first, and name it by its id.",
            )
    return checked


def _check_names(request: GenerationRequest) -> None:
    if request.model is not None and not _MODEL.fullmatch(request.model):
        raise UsageError("The model has to be a name.", "GET /v1/models lists them.")
    if request.prompt.strip() == "-":
        raise UsageError("the prompt is empty.", "Describe the video.")
    if "{" in request.prompt:
        raise UsageError(
            "The server takes no settings in the prompt.", "Leave out braces; use images, videos."
        )
    if isinstance(request.step_cache, StepCache) and request.step_cache.file:
        raise UsageError("The server takes no file of a step cache.", "Leave out file=.")
    if isinstance(request.tdtm, Tdtm) and request.tdtm.file:
        raise UsageError("The server takes no file of token merging.", "Leave out file=.")


def source_id(path: str) -> str:
    """Return the identifier of a file that a record names: uploads have no suffix, videos one."""
    name = Path(path).name
    return name.partition(".")[0] if _SOURCE.fullmatch(name.partition(".")[0]) else name


def source_ids(task: Task) -> list[str]:
    """Return the identifiers of the uploads and jobs that a task shows, continues or edits."""
    found = [str(item[0]) for name in ("images", "videos") for item in task.options.get(name, ())]
    return [str(task.options["video"]), *found] if task.kind == EDIT else found


def command(task: Task, sources: Sources, output: Path, *, steps: int, previews: bool) -> list[str]:
    """Return the words behind `mlx_sora` that carry out a task and write `output`.

    The same task always gives the same words, so that a run goes on from its checkpoint. steps: of
    the run, for the distance of checkpoints. previews: show them if the task does not say.
    """
    values = {name: value for name, value in task.options.items() if name != "output"}
    every = max(1, min(MAX_STEPS, round(steps / _PARTS)))
    words = [task.kind]
    if task.kind == EDIT:
        words.append(str(sources.path(values.pop("video"))))
        words.append(f"--source-prompt={values.pop('source_prompt')}")
        if (inject := values.pop("inject_steps", None)) is not None:
            words.append(f"--inject-steps={inject}")
    else:
        values["checkpoint_every"] = every
        if previews:
            values.setdefault("preview_every", every)
    for name in ("images", "videos"):
        if name in values:
            values[name] = [[str(sources.path(item[0])), *item[1:]] for item in values[name]]
    values["output"] = str(output).replace("{", "{{").replace("}", "}}")
    return [*words, *to_command_line(values), "--json-events"]


def _plain(value: Any) -> Any:
    return [list(item) for item in value] if isinstance(value, tuple) else value
