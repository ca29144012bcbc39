"""Plans of tasks on this machine, and what would fit in place of what does not. Heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from mlx_sora.errors import MemoryBudgetError, MlxSoraError
from mlx_sora.loading.preview_map import load_preview_map
from mlx_sora.memory.budget import AUTO, OFF, machine_capacity
from mlx_sora.memory.plan import Plan
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.device import backend
from mlx_sora.server.task import EDIT, PlanSummary, with_changes

#: Shares of length and size that are tried in place of what does not fit, and offers at most.
_SHORTER, _SMALLER, _MAX_OFFERS = (1, 0.75, 0.5, 0.25, 0), (1, 0.75, 0.5, 0.25), 4

#: Sides of offered sizes are multiples of this; lengths of a chunk's frames.
_SIDE, _CHUNK = 16, 17


def plan_task(
    pipeline: Pipeline,
    kind: str,
    options: Mapping[str, Any],
    paths: Mapping[str, str],
    output: str,
) -> PlanSummary:
    """Return the plan of a task. Raises UsageError, WeightsError.

    paths: files by the identifiers in the options. output: path without its suffix.
    """
    request = Planned(pipeline, kind, options, paths, output)
    capacity = machine_capacity()
    try:
        run = request.fitting_run(capacity)
    except MemoryBudgetError as refusal:
        return _refused(request, capacity, refusal)
    return _summary(request, run, capacity)


class Planned:
    """A task as the pipeline takes it, with its files."""

    def __init__(
        self,
        pipeline: Pipeline,
        kind: str,
        options: Mapping[str, Any],
        paths: Mapping[str, str],
        output: str,
    ) -> None:
        self.pipeline, self.kind = pipeline, kind
        values = {name: value for name, value in options.items() if name != "model"}
        for name in ("images", "videos"):
            if name in values:
                values[name] = [[paths[item[0]], *item[1:]] for item in values[name]]
        self._values, self._paths = values, paths
        self._suffix, self._output = values.pop("output", None), output

    @property
    def has_budget(self) -> bool:
        """True if the task itself limits its memory."""
        found = self._values
        return found.get("memory_budget", AUTO) != AUTO or "device_profile" in found

    def run(self, **changes: Any) -> GenerationRun:
        """Return the run of the task with some options changed, as it would begin."""
        values = with_changes(self._values, changes)
        output = self._output + (f".{self._suffix}" if self._suffix else "")
        values["output"] = output.replace("{", "{{").replace("}", "}}")
        if self.kind == EDIT:
            video = self._paths[values.pop("video")]
            return self.pipeline.prepare_edit(EditRequest.from_options(video, values))
        return self.pipeline.prepare(GenerationRequest.from_dict(values))

    def fitting_run(self, capacity: int, **changes: Any) -> GenerationRun:
        """Return the run within what this machine has. Raises MemoryBudgetError."""
        if self.has_budget:
            return self.run(**changes)
        if backend() == "cpu":  # where a run has no budget unless it needs one
            run = self.run(**changes | {"memory_budget": OFF})
            if run.plan.peak <= capacity:
                return run
        return self.run(**changes | {"memory_budget": str(capacity)})


def _summary(request: Planned, run: GenerationRun, capacity: int) -> PlanSummary:
    from mlx_sora.manage.machine_file import read_speeds

    plan, settings = run.plan, run.settings
    speeds = read_speeds().speeds
    model = run.engine.model
    return PlanSummary(
        model=model.path.name,
        width=run.written_size.width,
        height=run.written_size.height,
        frames=settings.clips.total,
        fps=settings.fps,
        steps=settings.steps,
        peak=plan.peak,
        smallest=plan.smallest,
        capacity=capacity,
        budget=plan.budget if backend() == "cpu" and not request.has_budget else None,
        seconds=None if speeds is None else round(run.estimate(speeds).total, 1),
        warnings=tuple(run.result.warnings),
        notes=tuple(settings.media.notes),
        shares=_shares(plan),
        suffix="" if run.output is None else run.output.suffix.lower(),
        previews=_has_preview_map(run.engine),
        in_ram=backend() != "cuda",
    )


def _shares(plan: Plan) -> dict[str, float]:
    """Return the share of the work that each stage has, in all passes."""
    work = Counter[str]()
    for stage in plan.stages:
        work[stage.stage] += stage.flops
    return {name: round(flops / (work.total() or 1), 4) for name, flops in work.items()}


def _has_preview_map(engine: Engine) -> bool:
    """Return True for a map that belongs to the model; runs refuse another."""
    with suppress(MlxSoraError):
        return load_preview_map(engine.model, engine.transformer_config.in_channels) is not None
    return False


def _refused(request: Planned, capacity: int, refusal: MemoryBudgetError) -> PlanSummary:
    """Return the plan of a task that does not fit, with what would."""
    run = request.run(memory_budget=OFF, device_profile=None)
    found = _summary(request, run, capacity)
    offers = tuple(_offers(request, run, capacity))
    error, fix = refusal.message, refusal.fix
    if not request.has_budget:
        error = (
            f"This needs {format_bytes(found.smallest)}, and {format_bytes(capacity)} are there."
        )
        fix = "Make a smaller or shorter video."
    if offers:
        words = [", ".join(f"{n} {value}" for n, value in offer.items()) for offer in offers]
        fix = f"These would fit: {'; '.join(words)}."
    return replace(found, fits=False, error=error, fix=fix, suggestions=offers, budget=None)


def _offers(request: Planned, run: GenerationRun, capacity: int) -> Iterator[dict[str, Any]]:
    """Yield the changes of a task that would fit, the smallest changes first."""
    count = 0
    for changes in _changes(request, run):
        try:
            request.fitting_run(capacity, **changes)
        except MlxSoraError:
            continue
        yield changes
        count += 1
        if count == _MAX_OFFERS:
            return


def _changes(request: Planned, run: GenerationRun) -> Iterator[dict[str, Any]]:
    if request.kind != EDIT and run.settings.guidance != 1:
        yield {"sequential_guidance": True}
    yield {"vae_tiles": 2}
    (width, height), frames = run.settings.geometry.decoded, run.settings.geometry.num_frames
    # Lengths and sizes one by one, and then both: the largest videos first.
    pairs = sorted(product(_SHORTER, _SMALLER), key=lambda pair: -(pair[0] or 0.01) * pair[1] ** 2)
    for length, scale in pairs[1:]:
        changes: dict[str, Any] = {}
        if length != 1:
            changes["num_frames"] = int(frames * length) // _CHUNK * _CHUNK or 1
        if scale != 1:
            sides = (max(_SIDE, int(side * scale) // _SIDE * _SIDE) for side in (width, height))
            if run.settings.second_pass is None:
                changes["width"], changes["height"] = sides
            else:
                changes["refine"] = "x".join(map(str, sides))
        yield changes
