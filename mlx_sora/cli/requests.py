"""The requests of a `generate` command: from flags, a prompt file, metadata or a checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_sora.cli.enhance import enhance_requests
from mlx_sora.cli.flags import build_requests, explicit_options
from mlx_sora.cli.opensora import ALL_PROMPTS, MAX_SEEDS, Samples, read_samples
from mlx_sora.errors import MlxSoraError, UsageError, WeightsError, printable
from mlx_sora.geometry import parse_frames
from mlx_sora.request.generation import GenerationRequest, with_sources
from mlx_sora.runtime.switches import missing_switches
from mlx_sora.text.prompt import split_directives
from mlx_sora.utils.json import parse_object
from mlx_sora.video.metadata import find_media, read_metadata, replay_options
from mlx_sora.video.output_path import (
    OutputNames,
    check_first_frame,
    check_obstacles,
    check_output,
    complete_path,
    existing_files,
    frame_path,
    is_sequence,
)
from mlx_sora.video.output_template import (
    ANY_DATE,
    DEFAULT_OUTPUT,
    dates_of,
    escape_template,
    files_of_any_date,
    fill_template,
    has_date,
    with_date,
)
from mlx_sora.video.reader import check_media_files

log = logging.getLogger(__name__)

#: Default outputs of a prompt file. A second run has to find them again, so the seed is in the
#: name only if it is given.
OUTPUT, OUTPUT_SEED = "{index:04d}-{prompt_slug}", "{index:04d}-{prompt_slug}-{seed}"

#: Most bytes of a prompt file.
MAX_BYTES = 32_000_000

JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass
class RequestBatch:
    """The requests of one command, in order.

    lines: line number of each request; empty without a prompt file. failures: errors by line or
    video number, from 1; unit: which of both. existing: outputs that are not made again. notes:
    lines for the user.
    """

    requests: list[GenerationRequest] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    failures: dict[int, MlxSoraError] = field(default_factory=dict)
    existing: list[Path] = field(default_factory=list)
    unit: str = "video"
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestBatch:
        """Return the batch of `to_dict`."""
        requests = list(map(GenerationRequest.from_dict, values["requests"]))
        return cls(requests, values["lines"], unit=values["unit"])

    def to_dict(self) -> dict[str, Any]:
        """Return the requests as JSON values."""
        requests = [request.to_dict() for request in self.requests]
        return {"requests": requests, "lines": self.lines, "unit": self.unit}

    @property
    def single_process(self) -> bool:
        """True if no other rank takes part in a request."""
        return any(request.parallel == "off" for request in self.requests)

    def number(self, index: int) -> int:
        """Return the number of request `index` in messages."""
        return self.lines[index] if self.lines else index + 1


def read_requests(args: argparse.Namespace) -> RequestBatch:
    """Return the requests of a command, checked as far as possible without a model.

    Raises UsageError.
    """
    flags, samples = read_samples(args, explicit_options(args))
    if args.resume is not None:
        if samples != ALL_PROMPTS:
            raise UsageError(
                "--resume and flags of Open-Sora for several videos exclude each other.",
                "A checkpoint is of one video.",
            )
        return RequestBatch([_resumed_request(args, flags)])
    recorded = None
    if args.config_from_metadata is not None:
        recorded = recorded_options(args.config_from_metadata, flags)
    enhance = args.enhance_prompt is not None
    if args.prompt_file is not None:
        if "prompt" in flags:
            raise UsageError("--prompt and --prompt-file exclude each other.", "Give only one.")
        batch = read_prompt_file(args.prompt_file, flags, recorded, samples, enhance=enhance)
    else:
        batch = _read_typed_prompts(flags, recorded, samples, enhance)
    names = OutputNames()
    for request in batch.requests:
        names.add(Path(str(request.output)), sidecar=request.metadata)
    if enhance:
        batch.requests, batch.notes = enhance_requests(batch.requests, args.enhance_prompt)
    return batch


def _read_typed_prompts(
    flags: Mapping[str, Any], recorded: Mapping[str, Any] | None, samples: Samples, enhance: bool
) -> RequestBatch:
    """Return the requests of the prompts in the flags, or of the one in the record."""
    batch, number = RequestBatch(), 0
    typed = flags.get("prompt", (recorded or {}).get("prompt", ""))
    prompts = typed if isinstance(typed, list) else [typed]
    samples.check_prompts(len(prompts))
    for place, prompt in enumerate(prompts):
        for options in samples.of_prompt(place, {**flags, "prompt": prompt}):
            for request in build_requests(options, dict(recorded or {})):
                number += 1
                if samples.prompt_as_path:
                    _add_request(batch, number, request, number - 1, enhance)
                else:
                    batch.requests.append(_with_output(request, number - 1, enhance))
    return batch


def _resumed_request(args: argparse.Namespace, flags: Mapping[str, Any]) -> GenerationRequest:
    from mlx_sora.pipeline.resume import resumed_request

    for name in ("config_from_metadata", "prompt_file", "enhance_prompt"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"--resume and {flag} exclude each other.", "Give only one.")
    return _with_output(resumed_request(Path(args.resume), flags), 0)


def recorded_options(source: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the run that made the file `source`, with its images and videos.

    Raises UsageError if one of them is neither typed nor found.
    """
    record = read_metadata(source)
    options = replay_options(record, source)
    if missing := missing_switches(record.get("mlx_switches")):
        text = "%s was made with %s in the environment; set so, the same device repeats it exactly"
        log.warning(text, printable(source), ", ".join(missing))
    used = {name: value for name, value in options.items() if name not in flags}
    request = GenerationRequest.from_dict({"prompt": "", **used})
    find = partial(find_media, record, source=Path(source))
    found = {
        "images": [i._replace(path=find(i.path, option="--image")) for i in request.images],
        "videos": [i._replace(path=find(i.path, option="--video")) for i in request.videos],
        "references": [find(path) for path in request.references],
        "prompt": _find_in_prompt(request.prompt, find),
    }
    return options | {name: value for name, value in found.items() if name in used}


def _find_in_prompt(prompt: str, find: Callable[[str], str]) -> str:
    """Return the prompt with the images and videos in its settings found."""
    text, directives = split_directives(prompt)
    if not directives.reference_path:
        return prompt
    names = filter(None, directives.reference_path.split(";"))
    values = {**asdict(directives), "reference_path": ";".join(map(find, names))}
    return text + json.dumps({k: v for k, v in values.items() if v is not None})


def read_prompt_file(
    path: str,
    flags: Mapping[str, Any],
    recorded: Mapping[str, Any] | None,
    samples: Samples = ALL_PROMPTS,
    *,
    enhance: bool = False,
) -> RequestBatch:
    """Return the requests of a file with a prompt, or a JSON object of options, in each line.

    Options in a line override flags. An error in a line becomes a failure of that line. enhance:
    the prompts are written out later. Raises UsageError if the file cannot be read or has no
    prompt.
    """
    batch, index, place = RequestBatch(unit="line"), 0, -1
    for place, (number, text) in enumerate(samples.select(_lines(path))):
        try:
            options = _line_options(text, Path(path).suffix.lower() in JSON_SUFFIXES)
            values = samples.of_prompt(place, _line_values(options, flags))
            requests = [each for every in values for each in _line_requests(every, recorded)]
        except MlxSoraError as error:
            batch.failures[number], index = error, index + 1
            continue
        for request in requests:
            try:
                _add_request(batch, number, request, index, enhance)
            except MlxSoraError as error:
                batch.failures[number] = error
            index += 1
    samples.check_prompts(place + 1)
    if not index:
        raise UsageError(f"{path} contains no prompt.", "Write a prompt in each line.")
    return batch


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of the lines that are neither empty nor comments."""
    number, left = 0, MAX_BYTES
    try:
        with Path(path).open("rb") as file:  # which may be a pipe
            # Only line feeds end a line: U+2028, U+0085 and form feeds occur inside prompts.
            while data := file.readline(left + 1):
                number, left = number + 1, left - len(data)
                if left < 0:
                    raise UsageError(f"{path} is larger than {MAX_BYTES / 1e6:g} MB.", "Split it.")
                line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line and not line.startswith("#"):
                    yield number, line
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"Cannot read {path}: {reason}.", "Give a text file.") from None


def _line_options(text: str, as_json: bool) -> dict[str, Any]:
    if not as_json:
        return {"prompt": text}
    try:
        return parse_object(text)
    except ValueError:
        raise UsageError(
            "The line is not a JSON object.", 'Write {"prompt": "...", ...}, each option once.'
        ) from None


def _line_values(options: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a line, over those of the flags. `seed` is a list."""
    values = dict(flags) | dict(options)
    if "seed" in options:
        seed = options["seed"]
        values["seed"] = seed if isinstance(seed, list) else [seed]
        if len(values["seed"]) > MAX_SEEDS:
            raise UsageError(f"A line has over {MAX_SEEDS} seeds.", "Write several lines.")
    return values


def _line_requests(
    values: dict[str, Any], recorded: Mapping[str, Any] | None
) -> list[GenerationRequest]:
    default = OUTPUT_SEED if "seed" in values else OUTPUT
    requests = build_requests(values, dict(recorded) if recorded else None)
    return [replace(request, output=request.output or default) for request in requests]


def _add_request(
    batch: RequestBatch, number: int, request: GenerationRequest, index: int, enhance: bool
) -> None:
    """Add a request of line `number`, or only its output if that exists already."""
    request, name = _fill_output(request, index, enhance)
    frames = 0 if request.num_frames is None else parse_frames(request.num_frames)
    path = complete_path(name, frames)
    for found in [path, *_outputs_of_other_days(request, index, frames)]:
        check_obstacles(found)
        existing = existing_files(found)
        if existing and not request.overwrite:
            check_first_frame(found, existing)
            _check_same_prompt(found, request.prompt)
            batch.existing.append(found)
            return
    check_media_files(*request.images, *request.videos)
    batch.requests.append(replace(request, output=escape_template(str(path))))
    batch.lines.append(number)


def _outputs_of_other_days(request: GenerationRequest, index: int, frames: int) -> Iterator[Path]:
    """Yield the outputs that exist under another {date}: a rerun does not make them again."""
    template = str(request.output)
    if not has_date(template):
        return
    anywhere = complete_path(_fill(request, with_date(template, ANY_DATE), index), frames)
    first = frame_path(anywhere, 0) if is_sequence(anywhere) else anywhere
    for file in files_of_any_date(first):
        for date in dates_of(file):
            yield complete_path(_fill(request, with_date(template, date), index), frames)


def _check_same_prompt(path: Path, prompt: str) -> None:
    """Raise UsageError if an existing output was made from another prompt."""
    try:
        record = read_metadata(frame_path(path, 0) if is_sequence(path) else path)
    except UsageError:  # written without metadata
        return
    recorded = record.get("request")
    names = ("prompt", "original_prompt")
    if isinstance(recorded, dict) and prompt not in map(recorded.get, names):
        raise UsageError(f"{path} exists and has another prompt.", "Move it, or give --overwrite.")


def _with_output(
    request: GenerationRequest, index: int, enhance: bool = False
) -> GenerationRequest:
    """Return the request with a seed and its output filled in.

    Raises UsageError if the output cannot be written, or an image or video is not there. `prepare`
    checks that too, but only after MLX is loaded, and in a batch the others would still be made.
    """
    check_media_files(*request.images, *request.videos)
    template = request.output or DEFAULT_OUTPUT
    request, name = _fill_output(replace(request, output=template), index, enhance)
    frames = None if request.num_frames is None else parse_frames(request.num_frames)
    # The suffix may follow from the number of frames, which may be left to the model.
    if frames is not None or Path(name).suffix or name.endswith("/") or not Path(name).name:
        path = complete_path(name, frames or 0)
        check_output(path, request.overwrite, sidecar=request.metadata, num_frames=frames)
    return replace(request, output=escape_template(name))


def _fill_output(
    request: GenerationRequest, index: int, enhance: bool
) -> tuple[GenerationRequest, str]:
    """Return the request with a seed, and the name that its output template then has."""
    if request.checkpoint_every is None:
        request = request.with_seed()
    else:
        request = _continued(request, index, enhance)
    return request, _fill(request, str(request.output), index)


def _continued(request: GenerationRequest, index: int, enhance: bool) -> GenerationRequest:
    from mlx_sora.pipeline.resume import continue_checkpoint

    return continue_checkpoint(request, index, _model_name(request), enhance=enhance)


def _fill(request: GenerationRequest, template: str, index: int) -> str:
    assert request.seed is not None, "_fill_output sets one"
    model = _model_name(request) if "{model" in template else ""
    return fill_template(
        template, prompt=request.prompt, seed=request.seed, index=index, model=model
    )


def _model_name(request: GenerationRequest) -> str:
    """Return the name of the model, whose folder may not be there for a plan."""
    from mlx_sora.loading.model_folder import PUBLISHED, find_model

    try:
        return find_model(request.model).name
    except WeightsError:
        return Path(request.model or PUBLISHED).name


@contextmanager
def name_origins(args: argparse.Namespace) -> Iterator[None]:
    """Add to an error of the block where the options come from that it names and nobody typed."""
    try:
        yield
    except MlxSoraError as error:
        message, fix = error.in_flags
        error.in_flags = (printable(with_sources(message, _sources(args))), fix)
        raise


def _sources(args: argparse.Namespace) -> dict[str, str]:
    """Return the file that decides each option, unless it was typed."""
    with suppress(MlxSoraError, OSError, ValueError, LookupError):
        source, values = _recorded(args)
        return {n: source for n in values if n not in vars(args)}
    return {}


def _recorded(args: argparse.Namespace) -> tuple[str, Mapping[str, Any]]:
    """Return the file that options come from, and these options."""
    if args.resume is not None:
        from mlx_sora.pipeline.checkpoint import read_record

        return args.resume, read_record(Path(args.resume))["request"]
    if args.config_from_metadata is not None:
        source = args.config_from_metadata
        return source, replay_options(read_metadata(source))
    return "", {}
