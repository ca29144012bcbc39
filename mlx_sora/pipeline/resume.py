"""Going on where a run was interrupted: what it keeps, and which run may take that up.

A checkpoint lies beside the output that it is to become and goes when that is finished. It is taken
up only by a run whose latents would be the same, bit for bit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import MlxSoraError, UsageError, WeightsError
from mlx_sora.memory.limits import release
from mlx_sora.pipeline.checkpoint import Snapshot, read_record
from mlx_sora.pipeline.locks import is_locked
from mlx_sora.pipeline.settings import ResolvedRequest
from mlx_sora.request.generation import GenerationRequest, label, options
from mlx_sora.request.modes import MAX_STEPS
from mlx_sora.runtime.events import Event, Warned
from mlx_sora.sampling.base import State
from mlx_sora.video.output_path import CHECKPOINT, checkpoint_path, output_path

if TYPE_CHECKING:
    from mlx_sora.pipeline.run import GenerationRun

log = logging.getLogger(__name__)

#: Options that the settings say better, or that a checkpoint knows by other names.
_SETTLED = ("prompt", "negative_prompt", "resolution", "aspect_ratio", "preset", "model", "dtype")


def attach(run: GenerationRun, weights: str, resume: Path | None) -> None:
    """Have a run keep checkpoints, and go on from the one that is its own.

    weights: the model's fingerprint. resume: the checkpoint to go on from; without, the one beside
    the output, if there is one. Raises UsageError where a checkpoint belongs to another run and
    WeightsError where it is damaged or of other weights.
    """
    request, output = run.request, run.output
    if output is None:
        raise UsageError("A checkpoint lies beside the output, and there is none.", "Give output.")
    path = checkpoint_path(output)
    source = path if resume is None else resume
    own = identity(run, weights)
    new = Snapshot(_asked(request), own, output.name)
    every = request.checkpoint_every or MAX_STEPS
    if resume is None and not path.exists():
        run.checkpoints = Checkpoints(path, every, new)
        return
    if source != path and path.exists() and not request.overwrite:
        raise UsageError(f"{path} exists already.", "Go on with it, or give --overwrite.")
    found = Snapshot.load(source)
    stranger = checkpoint_mismatch(source, found, own)
    if stranger is not None and (resume is not None or not request.overwrite):
        raise stranger
    if stranger is not None:
        run.warnings.append(f"{stranger.message} It will be replaced.")
        run.checkpoints = Checkpoints(path, every, new)
        return
    resumed = (*found.resumed, {"clip": found.clip, "step": found.steps})
    run.warnings += [*found.warnings, *_other_versions(source, found, new)]
    new = replace(
        found, request=new.request, output=new.output, versions=new.versions, resumed=resumed
    )
    run.checkpoints = Checkpoints(path, every, new, source)
    run.clips += found.accounts
    run.more["resumed"] = list(resumed)
    run.notes.append(_note(source, found, run.settings))
    release()


def identity(run: GenerationRun, weights: str) -> dict[str, Any]:
    """All that the latents of a run depend on, as JSON values.

    Every option that a replay takes over is part of it, also those still to come.
    """
    names = [name for name in _replayed() if name not in _SETTLED]
    found = {name: getattr(run.request, name) for name in names} | run.settings.to_dict()
    del found["memory_budget"]
    found["dtype"] = str(run.dtype).removeprefix("mlx.core.")
    found["weights"] = weights
    # Tables that were searched beforehand may have been searched again.
    found["schedule"] = [
        sorted(run.accelerations.skipped_steps),
        sorted(run.accelerations.cond_only_steps),
    ]
    plain: dict[str, Any] = _plain(found)
    return plain


def resumed_request(path: Path, changes: Mapping[str, Any]) -> GenerationRequest:
    """The request of a checkpoint, whose video goes beside it, with `changes` of what is written.

    Raises UsageError for a change that would make another video, and as `Snapshot.load` does.
    """
    found = Snapshot.load(path)
    for name in changes:
        if name in _replayed():
            raise UsageError(
                f"{label(name)} has no place beside --resume.", f"It is as {path} was begun with."
            )
    output = str(path.parent / found.output).replace("{", "{{").replace("}", "}}")
    values = {"model": found.identity.get("model"), **found.request, "output": output}
    return GenerationRequest.from_dict(values | dict(changes))


def with_seed(request: GenerationRequest, index: int = 0) -> GenerationRequest:
    """The request with its seed: its own, that of a checkpoint the same request left, or drawn.

    index: what {index} in the output stands for.
    """
    if request.seed is None and request.checkpoint_every is not None and request.output is not None:
        seed = _seed_left_behind(request, request.output, index)
        if seed is not None:
            return replace(request, seed=seed)
    return request.with_seed()


class Checkpoints:
    """What a run keeps of itself, and what an earlier one has left; without a path, nothing.

    every: steps from one checkpoint to the next.
    """

    def __init__(
        self,
        path: Path | None = None,
        every: int = 1,
        new: Snapshot | None = None,
        source: Path | None = None,
    ) -> None:
        """new: the run before its first step, or as `source` has it."""
        self._path, self._every, self._source = path, every, source
        self._written: Snapshot | None = None
        # States wait on disk until their clip begins: text is encoded first.
        self._known = None if new is None else replace(new, latents=None, state=None)
        self._complained = False

    @property
    def known(self) -> Snapshot | None:
        """The run as far as it is known; None where nothing is kept."""
        return self._known

    def finished(self, clip: int) -> mx.array | None:
        """Latents of a clip whose steps were all made before."""
        known = self._known
        return known.finished[clip] if known is not None and clip < known.clip else None

    def restored(self, clip: int) -> Snapshot | None:
        """What was made of a clip before, if anything was."""
        known = self._known
        if known is None or self._source is None or clip != known.clip or not known.steps:
            return None
        return Snapshot.load(self._source)

    def shared_across(self, ranks: Ranks) -> Checkpoints:
        """These of the first rank, as all ranks have them."""
        return self if ranks.size == 1 else SharedCheckpoints(self, ranks)

    def step_made(self, z: mx.array, steps: int, state: State) -> Iterator[Event]:
        """`steps` steps of the clip have led to z."""
        if self._known is not None:
            self._known = replace(self._known, latents=z, steps=steps, state=state)
            if steps % self._every == 0:
                yield from self._write()

    def clip_made(self, z: mx.array, account: Mapping[str, Any]) -> Iterator[Event]:
        """All steps of the clip have led to z; account: what accelerations did."""
        if self._known is not None:
            known = self._known
            finished, accounts = (*known.finished, z), (*known.accounts, account)
            self._known = replace(
                known, finished=finished, accounts=accounts, latents=None, steps=0, state=None
            )
            yield from self._write()

    def note_warnings(self, warnings: list[str]) -> None:
        """Remember what was told."""
        if self._known is not None:
            self._known = replace(self._known, warnings=tuple(warnings))

    @contextmanager
    def save_on_error(self) -> Iterator[None]:
        """Whatever ends the block early, the last step that was finished in it is written."""
        before = self._known
        try:
            yield
        except BaseException:
            if self._known is not before:
                for event in self._write():
                    log.warning("%s", event.message)
            raise

    def remove(self) -> None:
        """The video is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> Iterator[Warned]:
        """Write what is known, unless it is written; a run is not lost for want of a checkpoint."""
        assert self._path is not None
        assert self._known is not None
        if self._known is self._written:
            return
        try:
            self._known.save(self._path)
        except MlxSoraError as error:
            if not self._complained:
                yield Warned(f"{error} The run goes on without a checkpoint.")
            self._complained = True
        else:
            self._written = self._known


class SharedCheckpoints(Checkpoints):
    """Those of the first of several ranks, which has the files; others are told what is in them.

    All ranks know the same after a step, so that any number of them can go on from a file.
    """

    def __init__(self, own: Checkpoints, ranks: Ranks) -> None:
        super().__init__()
        self._own, self._ranks = own, ranks
        known = own.known
        found = () if known is None else known.finished
        self._finished: tuple[mx.array, ...] = ranks.broadcast_state(found)

    def finished(self, clip: int) -> mx.array | None:
        return self._finished[clip] if clip < len(self._finished) else None

    def restored(self, clip: int) -> Snapshot | None:
        found = self._ranks.on_rank0(lambda: self._own.restored(clip))
        names = ("latents", "steps", "state")
        told = self._ranks.broadcast_state(found and {name: getattr(found, name) for name in names})
        return None if told is None else Snapshot({}, {}, "", **told)

    def step_made(self, z: mx.array, steps: int, state: State) -> Iterator[Event]:
        yield from self._own.step_made(z, steps, state)

    def clip_made(self, z: mx.array, account: Mapping[str, Any]) -> Iterator[Event]:
        yield from self._own.clip_made(z, account)

    def note_warnings(self, warnings: list[str]) -> None:
        self._own.note_warnings(warnings)

    @contextmanager
    def save_on_error(self) -> Iterator[None]:
        with self._own.save_on_error():
            yield

    def remove(self) -> None:
        self._own.remove()


def _asked(request: GenerationRequest) -> dict[str, Any]:
    """The options as a checkpoint keeps them."""
    values = request.to_dict()
    values.pop("output", None)
    return values


def _replayed() -> list[str]:
    """Options that decide what a video shows."""
    return [name for name, option in options().items() if option.replay]


def _plain(value: Any) -> Any:
    """As JSON has it, where lists and tuples are one."""
    return json.loads(json.dumps(value))


def checkpoint_mismatch(
    source: Path, found: Snapshot, own: Mapping[str, Any]
) -> MlxSoraError | None:
    """What to say where a checkpoint is not of this run."""
    names = [n for n in {**own, **found.identity} if own.get(n) != found.identity.get(n)]
    if not names:
        return None
    fix = "Finish that one with --resume, delete it, or change --output."
    if "weights" in names:
        return WeightsError(f"{source} was begun with other weights than these.", fix)
    name = next((name for name in names if name != "schedule"), "step_cache")
    shown = label(name) if name in options() else name.replace("_", " ")
    old, new = (json.dumps(values.get(name))[:60] for values in (found.identity, own))
    return UsageError(f"{source} is of another run: {shown} was {old}, now {new}.", fix)


def _other_versions(source: Path, found: Snapshot, new: Snapshot) -> Iterator[str]:
    for name in ("mlx-sora", "mlx"):
        old, now = found.versions.get(name), new.versions.get(name)
        if old != now:
            yield f"{source} was written with {name} {old}, this is {now}: roundings may differ."


def _note(source: Path, found: Snapshot, settings: ResolvedRequest) -> str:
    """Where the run goes on, for the user."""
    clips = settings.clips.count
    if found.clip == clips:
        return f"going on from {source}: all steps are made"
    clip = f"clip {found.clip + 1} of {clips}, " if clips > 1 else ""
    return f"going on from {source}: {clip}{found.steps} of {settings.steps} steps are made"


def _seed_left_behind(request: GenerationRequest, template: str, index: int) -> int | None:
    """Seed of the newest checkpoint that the same request, without a seed, has left.

    What another process is at work on is its own: the same request then means another video.
    """
    asked = _without_seed(_asked(request.with_preset()))
    folder = output_path(template, prompt=request.prompt, seed=0, num_frames=0, index=index).parent
    files = [file for file in folder.glob(f"*{CHECKPOINT}") if file.is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            record = read_record(file)
            seed = int(record["request"]["seed"])
            if _without_seed(record["request"]) != asked:
                continue
        except (MlxSoraError, ValueError, TypeError, LookupError):
            continue
        make = partial(output_path, template, prompt=request.prompt, seed=seed, index=index)
        for output in (make(num_frames=frames) for frames in (1, 2)):
            if file == checkpoint_path(output) and not is_locked(output):
                return seed
    return None


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    replayed = set(_replayed()) - {"seed"}
    kept: dict[str, Any] = _plain({n: value for n, value in values.items() if n in replayed})
    return kept
