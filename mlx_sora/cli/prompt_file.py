"""PromptFile: the requests of a file with a prompt, or a JSON object of options, in each line."""

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

#: Default outputs, which a second run finds again: with the seed only if it is given.
OUTPUT, OUTPUT_SEED = "{index:04d}-{prompt_slug}", "{index:04d}-{prompt_slug}-{seed}"

#: Limits of a prompt file: bytes, and seeds in a line.
MAX_BYTES, MAX_SEEDS = 8_000_000, 1000

JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass
class PromptFile:
    """Requests to carry out one after the other.

    lines: line number of each request; empty without a file. finished: outputs that exist already.
    failures: errors by number, which counts in `unit`s from 1.
    """

    requests: list[GenerationRequest] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    failures: dict[int, MlxSoraError] = field(default_factory=dict)
    finished: list[Path] = field(default_factory=list)
    unit: str = "video"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFile:
        """Return the file of `to_dict`."""
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


def read_batch(
    path: str, typed: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> PromptFile:
    """Return the requests of a file. Options in a line override typed ones.

    Raises UsageError for a file that cannot be read or has no prompt. An error in a line becomes
    a failure of that line.
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
        raise UsageError(f"{path} holds no prompt.", "Write a prompt in each line.")
    return batch


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of the lines that are neither empty nor comments."""
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
    if not as_json:
        return {"prompt": text}
    try:
        return parse_object(text)
    except ValueError:
        raise UsageError(
            "The line is not a JSON object.", 'Write {"prompt": "...", ...}, each option once.'
        ) from None


def _requests(
    line: dict[str, Any], typed: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> list[GenerationRequest]:
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
    """Add a request with its output filled in, unless the output exists already."""
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
    """Raise UsageError if an existing output has another prompt."""
    file = frame_path(path, 0) if is_sequence(path) else path
    try:
        record = read_metadata(file)
    except UsageError:  # written without metadata
        return
    made = record.get("request")
    if isinstance(made, dict) and made.get("prompt") != request.prompt:
        raise UsageError(f"{path} exists and has another prompt.", "Move it, or give --overwrite.")
