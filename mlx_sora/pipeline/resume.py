"""Resuming an interrupted run: which run may continue from which checkpoint.

A run continues from a checkpoint only if its latents would be the same, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import MlxSoraError, UsageError, WeightsError, shell_words
from mlx_sora.loading.fingerprint import PREFIX
from mlx_sora.memory.limits import release
from mlx_sora.models.precision import dtype_name
from mlx_sora.pipeline.checkpoint import Checkpoints, Snapshot, read_record
from mlx_sora.pipeline.locks import is_locked
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.request.generation import GenerationRequest, label, options
from mlx_sora.request.pixels import PIXELS_PREFIX
from mlx_sora.request.techniques import MAX_STEPS
from mlx_sora.video.output_path import CHECKPOINT_SUFFIX, checkpoint_path, output_path
from mlx_sora.video.output_template import (
    ANY_DATE,
    dates_of,
    escape_template,
    files_of_any_date,
    has_date,
    with_date,
)

#: Options that the resolved request says better, or that a checkpoint has under other names.
_RESOLVED = ("prompt", "negative_prompt", "resolution", "aspect_ratio", "preset", "model", "dtype")


def with_checkpoints(run: GenerationRun, resume: Path | None) -> GenerationRun:
    """Return the run with checkpoints, restored from its own earlier checkpoint if there is one.

    resume: the checkpoint to continue from; None for the one beside the output, if it exists.
    Raises UsageError if the checkpoint belongs to another run, and WeightsError if it is damaged
    or of other weights.
    """
    request, output = run.request, run.output
    if output is None:
        raise UsageError("A checkpoint needs an output file to lie beside.", "Give output.")
    path = checkpoint_path(output)
    source = path if resume is None else resume
    run = _in_all_passes(run, weights=run.engine.fingerprint())
    own = identity(run)
    new = Snapshot(_recorded_options(request), own, output.name)
    every = request.checkpoint_every or MAX_STEPS
    if resume is None and not path.exists():
        return _in_all_passes(run, checkpoints=Checkpoints(path, every, new))
    if source != path and path.exists() and not request.overwrite:
        raise UsageError(f"{path} exists already.", "Resume from it, or give --overwrite.")
    found = Snapshot.load(source)
    mismatch = checkpoint_mismatch(source, found, own, request)
    if mismatch is not None:
        if resume is not None or not request.overwrite:
            raise mismatch
        run.result.warnings.append(f"{mismatch.message} It will be replaced.")
        return _in_all_passes(run, checkpoints=Checkpoints(path, every, new))
    resumed = (*found.resumed, {"clip": found.clip, "step": found.steps})
    run.result.warnings += [*found.warnings, *_version_warnings(source, found, new)]
    run.result.clips += found.accounts
    run.result.metadata["resumed"] = list(resumed)
    note = _progress_note(source, found, run)
    new = replace(
        found, request=new.request, output=new.output, versions=new.versions, resumed=resumed
    )
    del found
    release()
    run = _in_all_passes(run, checkpoints=Checkpoints(path, every, new, source))
    return replace(run, notes=(*run.notes, note))


def _in_all_passes(run: GenerationRun, **values: Any) -> GenerationRun:
    """Return the run with new values of fields, which its passes share."""
    first = run.first_pass and replace(run.first_pass, **values)
    return replace(run, first_pass=first, **values)


def identity(run: GenerationRun) -> dict[str, Any]:
    """Return everything that the latents of a run depend on, as JSON values.

    Contains every option that a replay takes over, so that new options are covered too.
    """
    names = [name for name in _replayed_options() if name not in _RESOLVED]
    found = {name: getattr(run.request, name) for name in names} | run.settings.to_dict()
    del found["memory_budget"]
    found["dtype"] = dtype_name(run.engine.precision.transformer)
    found["weights"] = run.weights
    # A table may have been calibrated again since.
    found["schedule"] = [
        sorted(steps)
        for each in run.passes
        for steps in (each.accelerations.skipped_steps, each.accelerations.cond_only_steps)
    ]
    tdtm = run.settings.accelerations.get("tdtm")
    if tdtm is not None and tdtm.mode == "table":
        steps = range(run.settings.steps)
        found["merging"] = [
            each.accelerations.merged_sites(i) for each in run.passes for i in steps
        ]
    plain: dict[str, Any] = _as_json(found)
    return plain


def resumed_request(path: Path, changes: Mapping[str, Any]) -> GenerationRequest:
    """Return the request of a checkpoint, its output beside the file, with `changes` applied.

    Raises UsageError for a change that would make another video, and as `Snapshot.load` does.
    """
    found = Snapshot.load(path)
    output = escape_template(str(path.parent / found.output))
    values = {"model": found.identity.get("model"), **found.request, "output": output}
    seeds = changes.get("seed")  # several on the command line
    single = {"seed": seeds[0]} if isinstance(seeds, list) and len(seeds) == 1 else {}
    pixels = {name for name, value in values.items() if _has_pixels(value)}
    before = GenerationRequest.from_dict({n: v for n, v in values.items() if n not in pixels})
    request = GenerationRequest.from_dict({**values, **changes, **single})
    for name in changes:
        old, new = getattr(before, name), getattr(request, name)
        if name in _replayed_options() and name not in pixels and old != new:
            raise UsageError(
                f"{label(name)} cannot be changed with --resume: it is {str(old)[:60]} in {path}, "
                f"{str(new)[:60]} in the command.",
                f"Leave {label(name)} out.",
            )
    return request


def _has_pixels(recorded: Any) -> bool:
    """Return True for pictures or videos in memory, which have to be passed again.

    Their names have checksums, and a run goes on only from a checkpoint with the same.
    """
    return f'"{PIXELS_PREFIX}' in json.dumps(recorded)


def _recorded_options(request: GenerationRequest) -> dict[str, Any]:
    values = request.to_dict()
    values.pop("output", None)
    return values


def _replayed_options() -> list[str]:
    """Return the names of the options that decide what a video shows, at whatever size."""
    return [n for n, option in options().items() if option.replay and n != "scale"]


def _as_json(value: Any) -> Any:
    # JSON does not tell lists from tuples.
    return json.loads(json.dumps(value, default=str))


def checkpoint_mismatch(
    source: Path, found: Snapshot, own: Mapping[str, Any], request: GenerationRequest
) -> MlxSoraError | None:
    """Return the error if a checkpoint belongs to another run, else None."""
    names = [n for n in {**own, **found.identity} if own.get(n) != found.identity.get(n)]
    if not names:
        return None
    resume = f"python -m mlx_sora generate --resume {shell_words(source)}"
    fix = f"Delete it, change --output, or finish that one: {resume}"
    if not str(found.identity.get("weights")).startswith(PREFIX):
        message = f"{source} is of an earlier version, which compared a sample of the weights only."
        return WeightsError(message, "Go on with that version of mlx_sora, or delete it.")
    if "weights" in names:
        return WeightsError(f"{source} was made with other weights.", fix)
    # A seed may be drawn, and other settings follow from these.
    first = ("text", "scenes", "negative_text", "media")
    causes = [name for name in names if name not in ("schedule", "seed")]
    causes.sort(key=lambda name: name not in first)
    name = next(iter(causes), "seed" if "seed" in names else "step_cache")
    old, new = (json.dumps(values.get(name))[:60] for values in (found.identity, own))
    origin = ", the model's default" if getattr(request, name, "") is None else ""
    message = f"{source} belongs to another run: {_shown(name)} was {old}, now {new}{origin}."
    return UsageError(message, fix)


def _shown(name: str) -> str:
    if name in options():
        return label(name)
    texts = {
        "merging": "the table of token merging",
        "text": "the prompt",
        "scenes": "the prompt",
        "negative_text": "--negative-prompt",
    }
    return texts.get(name, name.replace("_", " "))


def _version_warnings(source: Path, found: Snapshot, new: Snapshot) -> Iterator[str]:
    for name in ("mlx-sora", "mlx"):
        old, now = found.versions.get(name), new.versions.get(name)
        if old != now:
            yield f"{source} was written with {name} {old}, this is {now}: roundings may differ."


def _progress_note(source: Path, found: Snapshot, run: GenerationRun) -> str:
    passes, clips = run.passes, run.settings.clips.count
    clip = found.clip // len(passes)
    if clip == clips:
        return f"resuming from {source}: all steps are done"
    number = found.clip % len(passes)
    settings = passes[number].settings
    place = f"clip {clip + 1} of {clips}, " if clips > 1 else ""
    place += f"pass {number + 1} of {len(passes)}, " if len(passes) > 1 else ""
    done = max(0, found.steps - settings.first_step)
    return f"resuming from {source}: {place}{done} of {settings.steps_to_make} steps are done"


def continue_on_ranks(request: GenerationRequest, ranks: Ranks, model: str) -> GenerationRequest:
    """Return the request that `continue_checkpoint` finds on rank 0, which has the checkpoint."""
    request = continue_checkpoint(request, model=model)
    seed, output = ranks.broadcast_object([request.seed, request.output])
    return replace(request, seed=seed, output=output)


def continue_checkpoint(
    request: GenerationRequest, index: int = 0, model: str = "", *, enhance: bool = False
) -> GenerationRequest:
    """Return the request with a seed, and if a checkpoint continues it, with its seed and date.

    That is the newest checkpoint of the same request that no other process is writing.
    index, model: values of {index} and {model} in the output. enhance: the prompt is written out
    later; a checkpoint continues the request if it has the same one as `original_prompt`.
    """
    template = request.output
    if request.checkpoint_every is None or template is None:
        return request.with_seed()
    own = _options_but_seed(_recorded_options(request.with_preset()), enhance)
    make = partial(output_path, prompt=request.prompt, index=index, model=model)
    anywhere = with_date(template, ANY_DATE) if has_date(template) else template
    first = make(anywhere, seed=request.seed or 0, num_frames=0)
    files = [file for file in files_of_any_date(first, f"*{CHECKPOINT_SUFFIX}") if file.is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            recorded = read_record(file)["request"]
            seed = int(recorded["seed"])
            if request.seed not in (None, seed) or _options_but_seed(recorded, enhance) != own:
                continue
        except (MlxSoraError, ValueError, TypeError, LookupError):
            continue
        for date in dates_of(file) if has_date(template) else [""]:
            dated = with_date(template, date) if date else template
            for output in (make(dated, seed=seed, num_frames=frames) for frames in (1, 2)):
                if file == checkpoint_path(output) and not is_locked(output):
                    return replace(request, output=dated).with_seed(seed)
    return request.with_seed()


def _options_but_seed(values: Mapping[str, Any], enhance: bool) -> dict[str, Any]:
    """Return what has to be the same, with the typed prompt in place of an enhanced one."""
    replayed = set(_replayed_options()) - {"seed"}
    if enhance:
        values = {**values, "prompt": values.get("original_prompt") or values["prompt"]}
        replayed -= {"original_prompt"}
    plain: dict[str, Any] = _as_json({n: value for n, value in values.items() if n in replayed})
    return plain
