"""A file of prompts: one a line, or JSON objects that hold any option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_sora.cli.flags import build_requests, resolve_seed
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.geometry import parse_frames
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.utils.json import parse_object
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.output_path import (
    existing_files,
    fill_template,
    frame_path,
    is_sequence,
    output_path,
)

#: Names that a second run finds again: without the seed, unless that is known beforehand.
OUTPUT, OUTPUT_SEED = "{index:04d}-{prompt_slug}", "{index:04d}-{prompt_slug}-{seed}"

#: Bytes of a file of prompts, and seeds in a line of it.
MAX_BYTES, MAX_SEEDS = 8_000_000, 1000

JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass
class PromptFile:
    """Requests to make in a row. lines: of the file, of each request; none without a file.

    unit: what failures are counted in, from 1. finished: what is there already.
    """

    requests: list[GenerationRequest] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    failures: dict[int, MlxSoraError] = field(default_factory=dict)
    finished: list[Path] = field(default_factory=list)
    unit: str = "video"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFile:
        """What `to_dict` told."""
        requests = list(map(GenerationRequest.from_dict, values["requests"]))
        return cls(requests, values["lines"], unit=values["unit"])

    def to_dict(self) -> dict[str, Any]:
        """What is to be made, as plain JSON values."""
        requests = [request.to_dict() for request in self.requests]
        return {"requests": requests, "lines": self.lines, "unit": self.unit}

    @property
    def single_process(self) -> bool:
        """Whether a request leaves nothing to other ranks."""
        return any(request.parallel == "off" for request in self.requests)

    def number(self, index: int) -> int:
        """How request `index` is called."""
        return self.lines[index] if self.lines else index + 1


def read_batch(
    path: str, typed: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> PromptFile:
    """The requests of a file; options on the command line hold where a line says nothing.

    Raises UsageError for a file that cannot be read or has no prompt in it; what is wrong in a
    line becomes a failure of that line.
    """
    batch, index = PromptFile(unit="line"), 0
    for number, text in _lines(path):
        try:
            line = _values(text, Path(path).suffix.lower() in JSON_SUFFIXES)
            requests = _requests(line, typed, recorded)
        except MlxSoraError as error:
            batch.failures[number], index = error, index + 1
            continue
        for request in requests:
            try:
                _add(batch, number, request, index)
            except MlxSoraError as error:
                batch.failures[number] = error
            index += 1
    if not index:
        raise UsageError(f"{path} holds no prompt.", "Write one a line.")
    return batch


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line that is neither empty nor a comment."""
    try:
        with Path(path).open("rb") as file:  # which may be a pipe
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES / 1e6:g} MB.", "Split it.")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"Cannot read {path}: {reason}.", "Give a text file.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _values(text: str, as_json: bool) -> dict[str, Any]:
    """Options of a line."""
    if not as_json:
        return {"prompt": text}
    try:
        return parse_object(text)
    except ValueError:
        raise UsageError(
            "The line is no JSON object.", 'Write {"prompt": "...", ...}, each option once.'
        ) from None


def _requests(
    line: dict[str, Any], typed: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> list[GenerationRequest]:
    """A request per seed of a line; its own options come before those on the command line."""
    values = dict(typed) | line
    if "seed" in line:
        values["seed"] = line["seed"] if isinstance(line["seed"], list) else [line["seed"]]
        if len(values["seed"]) > MAX_SEEDS:
            raise UsageError(f"A line has over {MAX_SEEDS} seeds.", "Write several lines.")
    known = "seed" in values
    requests = build_requests(values, dict(recorded) if recorded else None)
    default = OUTPUT_SEED if known else OUTPUT
    return [replace(each, output=each.output or default) for each in requests]


def _add(batch: PromptFile, number: int, request: GenerationRequest, index: int) -> None:
    """Add a request with its output filled in, unless that is there already."""
    request = resolve_seed(request, index)
    assert request.output is not None, "_requests gives every request an output"
    assert request.seed is not None, "resolve_seed gives it one"
    frames = 0 if request.num_frames is None else parse_frames(request.num_frames)
    name = fill_template(request.output, prompt=request.prompt, seed=request.seed, index=index)
    escaped = name.replace("{", "{{").replace("}", "}}")
    path = output_path(escaped, prompt="", seed=0, num_frames=frames)
    if existing_files(path) and not request.overwrite:
        _check_same(path, request)
        batch.finished.append(path)
        return
    batch.requests.append(replace(request, output=str(path).replace("{", "{{").replace("}", "}}")))
    batch.lines.append(number)


def _check_same(path: Path, request: GenerationRequest) -> None:
    """Raise UsageError where a finished output shows something else."""
    file = frame_path(path, 0) if is_sequence(path) else path
    try:
        record = read_metadata(file)
    except UsageError:  # written without metadata
        return
    made = record.get("request")
    if isinstance(made, dict) and made.get("prompt") != request.prompt:
        raise UsageError(
            f"{path} exists and was made of another prompt.", "Move it, or give --overwrite."
        )
