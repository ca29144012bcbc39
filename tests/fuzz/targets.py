"""Every reader of what others wrote, each as a function of bytes, with inputs to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx_sora
from mlx_sora.errors import WeightsError
from tests.fuzz import model_files, samples, second
from tests.fuzz.mutators import mutate_bytes, mutate_json, mutate_text
from tests.fuzz.shell import type_advice
from tests.fuzz.verdict import MAX_SECONDS

Mutate = Callable[[bytes, int, int], bytes]


@dataclass(frozen=True)
class Target:
    """One reader.

    run: feeds it bytes, with a folder of its own for files. limit: most bytes; seconds: most
    processor time of an execution.
    """

    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate = mutate_json
    limit: int = 1 << 16
    seconds: float = MAX_SECONDS


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _prompt(data: bytes, folder: Path) -> None:
    from mlx_sora.text.prompt import Scores, prepare_prompt

    prompt = prepare_prompt(_text(data), Scores(6.5, 3.0, "pan left"))
    prompt.text(0), prompt.text(7)


def _repeated(data: bytes, folder: Path) -> None:
    """Cleaning a text that is one short piece over and over: what is quadratic shows."""
    from mlx_sora.text.cleaning import preprocess

    text = _text(data[:24]) or "a"
    preprocess((text * (5_000 // len(text) + 1))[:5_000])


@cache
def _tokenizer() -> Any:
    from mlx_sora.loading.model_folder import BUNDLED, find_model
    from mlx_sora.text.tokenizer import Tokenizer

    return Tokenizer.load(find_model(BUNDLED).tokenizer)


def _tokens(data: bytes, folder: Path) -> None:
    """T5's whole vocabulary, against the `tokenizers` library."""
    from mlx_sora.loading.model_folder import BUNDLED, find_model

    text = _text(data)
    theirs = second.t5_tokenizer(find_model(BUNDLED).tokenizer.read_bytes())
    second.agree("ids", list(_tokenizer().encode(text, 1 << 14).ids), [*theirs.encode(text).ids, 1])


def _strategy(data: bytes, folder: Path) -> None:
    from mlx_sora.conditioning import media
    from mlx_sora.conditioning.clips import Clips
    from mlx_sora.geometry import Size

    size, clips = Size(64, 64), Clips(34, 3)
    sources = [
        media.MediaFile("a.png", size, 1, "0" * 64),
        media.MediaFile("b.mp4", size, 40, "1" * 64, 24.0),
    ]
    placements = media._mask_groups(_text(data), sources, clips)
    found = media.Media(clips, references=tuple(sources), mask_groups=tuple(placements))
    for clip in range(clips.count):
        lengths = [source.latents for source in sources] + [10] * clip
        second.agree(
            f"mask of {clip}", found.mask(clip), second.mask(_text(data), lengths, 10, clip, 5)
        )


def _options(data: bytes, folder: Path) -> None:
    """A JSON object of options, as far as a run gets without weights."""
    from mlx_sora.cli.flags import build_requests
    from mlx_sora.loading.model_folder import BUNDLED, find_model
    from mlx_sora.pipeline.settings import resolve
    from mlx_sora.request.generation import GenerationRequest
    from mlx_sora.video.output_path import output_path

    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return
    seed = values.pop("seed", 1)
    for request in build_requests(values | {"seed": [seed]}):
        if request.output is not None:
            output_path(request.output, prompt=request.prompt, seed=1, num_frames=17)
        second.agree("request", GenerationRequest.from_dict(request.to_dict()), request)
        whole = {k: v for k, v in values.items() if type(v) is bool or k == "steps"}
        second.same_values("request", request, whole)
        resolve(request, find_model(BUNDLED))


def _words(data: bytes, folder: Path) -> None:
    """A text as the value of every option, and of what else is read from a word."""
    from mlx_sora.geometry import parse_frames, resolve_size
    from mlx_sora.manage.sources import choose_endpoint, choose_sources
    from mlx_sora.memory.profiles import parse_bytes, profile_budget
    from mlx_sora.request.generation import ANY_SIZE, options
    from mlx_sora.video.output_path import frame_path, output_path
    from mlx_sora.video.output_template import fill_template

    text = _text(data)
    readers: list[Callable[[], Any]] = [
        *(lambda name=name: _round_trip(name, text) for name in options()),
        lambda: parse_frames(text),
        lambda: parse_bytes(text),
        lambda: profile_budget(text),
        lambda: resolve_size(ANY_SIZE, resolution=text),
        lambda: resolve_size(ANY_SIZE, aspect_ratio=text),
        lambda: fill_template(text, prompt="a cat", seed=1, index=2),
        lambda: frame_path(output_path(text, prompt="a", seed=1, num_frames=1), 3),
        lambda: choose_sources([text]),
        lambda: choose_endpoint(text),
    ]
    errors = []
    for read in readers:
        try:
            read()
        except mlx_sora.MlxSoraError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: (not str(error).isprintable(), len(str(error))))


def _round_trip(name: str, text: str) -> None:
    """Read an option from a word, and again from what a record says of it."""
    from mlx_sora.request.generation import GenerationRequest

    request = GenerationRequest.from_dict({name: text})
    record = json.loads(json.dumps(request.to_dict()))
    second.agree(name, GenerationRequest.from_dict(record), request)


def _prompt_file(data: bytes, folder: Path) -> None:
    from mlx_sora.cli.requests import read_prompt_file

    path = folder / "many.jsonl"
    path.write_bytes(data)
    batch = read_prompt_file(str(path), {}, None)
    lines = data.decode("utf-8-sig").split("\n")
    for number, request in zip(batch.lines, batch.requests, strict=True):
        prompt = json.loads(lines[number - 1]).get("prompt", "")
        second.agree("prompt", request.prompt, prompt if isinstance(prompt, str) else "")
    if batch.failures:
        raise max(
            batch.failures.values(),
            key=lambda error: (not str(error).isprintable(), len(str(error))),
        )


def _record(data: bytes, folder: Path) -> None:
    """Metadata in a JSON file, replayed."""
    from mlx_sora.cli.flags import build_requests
    from mlx_sora.cli.requests import recorded_options

    path = folder / "a.json"
    path.write_bytes(data)
    (request,) = build_requests({}, recorded_options(str(path), {}))
    recorded = json.loads(data)
    settings = {k: v for k, v in recorded.get("settings", {}).items() if k in ("width", "height")}
    second.same_values("settings", request, settings)


def _metadata(suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        from mlx_sora.video.metadata import PNG_KEY, read_metadata

        path = folder / f"a{suffix}"
        path.write_bytes(data)
        record = read_metadata(path)
        if suffix == ".png" and data.startswith(b"\x89PNG"):
            second.agree("record", record, json.loads(second.png_text(data, PNG_KEY) or "null"))
        else:
            second.contains_record(data, record)

    return run


def _image(data: bytes, folder: Path) -> None:
    from mlx_sora.geometry import Size
    from mlx_sora.video.reader import image_size, read_image

    path = folder / "a.png"
    path.write_bytes(data)
    size = image_size(path)
    second.agree("shape", read_image(path, Size(64, 64)).shape, (64, 64, 3))
    second.agree("size", (size.width, size.height), second.picture_size(path))


def _video(data: bytes, folder: Path) -> None:
    from mlx_sora.geometry import Size
    from mlx_sora.video.reader import probe_video, read_video

    path = folder / "a.mp4"
    path.write_bytes(data)
    info = probe_video(path)
    footage = read_video(path, 17, size=Size(64, 64))
    second.agree("shape", footage.frames.shape, (min(17, info.num_frames), 64, 64, 3))


def _table(data: bytes, folder: Path) -> None:
    from mlx_sora.accel.base import ScheduleInfo
    from mlx_sora.accel.schedules import read_schedule

    path = folder / "table.json"
    path.write_bytes(data)
    info = ScheduleInfo(30, 1, 17, model=folder, size=(64, 64, 17))
    steps = (
        json.loads(data)["orders"]["0"]["8"]
        if (found := read_schedule(8, 0, info, str(path)))
        else []
    )
    second.agree("steps", sorted(found), sorted(steps))
    second.agree("a step that a run of 30 lacks", [n for n in found if not 0 <= n < 30], [])


def _merging(data: bytes, folder: Path) -> None:
    from mlx_sora.accel.base import ScheduleInfo
    from mlx_sora.accel.merging_table import read_merging, read_merging_table

    path = folder / "table.json"
    path.write_bytes(data)
    size = (64, 64, 17)
    info = ScheduleInfo(30, 1, 5, model=folder, model_name="shapes", size=size, blocks=4)
    found, content = read_merging(1.01, info, str(path)), json.loads(data)
    own = {name: value for name, value in content.items() if name != "parts"}
    second.same_values("table", read_merging_table(path), own)
    first = content["parts"][0]
    for step in range(first["steps"][0], first["steps"][1] + 1):
        block = found[step][first["blocks"][0]]
        second.agree("site", first["site"] in block or first["site"].endswith("-kv"), True)
    second.agree("a step that a run of 30 lacks", [n for n in found if not 0 <= n < 30], [])


def _checkpoint(data: bytes, folder: Path) -> None:
    """The record of a checkpoint, with a checksum that is right."""
    import mlx.core as mx

    from mlx_sora.pipeline.checkpoint import _digest
    from mlx_sora.pipeline.resume import resumed_request

    path, record = folder / "a.mp4.checkpoint.safetensors", _text(data)
    arrays = {"run.latents": mx.zeros((1, 2, 2, 2, 4)), "run.state.x": mx.zeros(3)}
    notes = {"format": "1", "record": record, "sha256": _digest(record, arrays)}
    try:
        mx.save_safetensors(str(path), arrays, notes)
    except (RuntimeError, ValueError):
        return
    request = resumed_request(path, {})
    if Path(str(request.output)).resolve().parent != folder.resolve():
        raise AssertionError(f"outside: {request.output}")
    recorded = json.loads(record)["request"]
    second.same_values(
        "request", request, {k: recorded[k] for k in ("prompt", "seed", "steps") if k in recorded}
    )


def _listing(data: bytes, folder: Path) -> None:
    """The hub's answer about a repository, as the client parses it."""
    from unittest.mock import Mock, patch

    from huggingface_hub import hf_api

    from mlx_sora.manage.hub import Hub
    from mlx_sora.manage.sources import SOURCES

    session, answer = Mock(), Mock()
    session.get.return_value = answer
    answer.json = lambda: json.loads(data)
    with (
        patch.object(hf_api, "get_session", lambda: session),
        patch.object(hf_api, "hf_raise_for_status", lambda _: None),
    ):
        for file in Hub("http://127.0.0.1:9").files(SOURCES[0]):
            inside = (folder / file.path).resolve()
            if folder.resolve() not in inside.parents:
                raise WeightsError(f"OUTSIDE {file.path}\n")
            rows = [r for r in json.loads(data)["siblings"] if str(r["rfilename"]) == file.name]
            row = rows[-1].get("lfs") or rows[-1]
            second.agree("size", file.size, row["size"])
            second.agree("checksum", file.checksum, row.get("sha256", row.get("blobId")))


TARGETS: dict[str, Target] = {
    "header": Target(model_files.header, samples.headers),
    "safetensors": Target(model_files.safetensors, samples.safetensors, mutate_bytes),
    "index": Target(model_files.index, samples.indexes),
    "config-t5": Target(
        model_files.config("text_encoder"), lambda: samples.configs("text_encoder")
    ),
    "config-stdit": Target(
        model_files.config("transformer"), lambda: samples.configs("transformer")
    ),
    "config-vae": Target(model_files.config("vae"), lambda: samples.configs("vae")),
    "model-index": Target(model_files.model_index, samples.model_indexes),
    "provenance": Target(model_files.provenance, samples.provenances),
    "statistics": Target(model_files.statistics, samples.statistics),
    "advice": Target(type_advice, samples.foreign_words, mutate_text, 1 << 11),
    "spiece": Target(model_files.tokenizer_model, samples.spieces, mutate_bytes),
    "prompt": Target(_prompt, samples.prompts, mutate_text, 1 << 12),
    "repeated": Target(_repeated, samples.pieces, mutate_text, 24, seconds=1.0),
    "tokens": Target(_tokens, samples.prompts, mutate_text, 1 << 12),
    "strategy": Target(_strategy, samples.strategies, mutate_text, 1 << 12),
    "options": Target(_options, samples.options),
    "words": Target(_words, samples.words, mutate_text, 1 << 10),
    "prompt-file": Target(_prompt_file, samples.prompt_files),
    "record": Target(_record, samples.records),
    "metadata-png": Target(_metadata(".png"), lambda: samples.media(".png"), mutate_bytes),
    "metadata-gif": Target(_metadata(".gif"), lambda: samples.media(".gif"), mutate_bytes),
    "metadata-webp": Target(_metadata(".webp"), lambda: samples.media(".webp"), mutate_bytes),
    "metadata-mp4": Target(_metadata(".mp4"), lambda: samples.media(".mp4"), mutate_bytes),
    "image": Target(_image, samples.pictures, mutate_bytes),
    "video": Target(_video, samples.videos, mutate_bytes),
    "table": Target(_table, samples.tables),
    "merging": Target(_merging, samples.merging_tables),
    "checkpoint": Target(_checkpoint, samples.checkpoints),
    "listing": Target(_listing, samples.listings),
}


def import_all() -> None:
    """Import what the targets use: their modules are imported as late as they can be."""
    import importlib

    for name in MODULES:
        importlib.import_module(f"mlx_sora.{name}")


#: Modules that the targets use.
MODULES = (
    *(
        "accel.merging_table",
        "accel.schedules",
        "cli.doctor",
        "cli.flags",
        "cli.requests",
        "conditioning.media",
    ),
    *("loading.checkpoint", "loading.networks", "manage.doctor", "manage.hub"),
    *("pipeline.resume", "pipeline.settings", "text.prompt", "text.tokenizer"),
    *("video.containers", "video.metadata", "video.output_path", "video.reader"),
)
