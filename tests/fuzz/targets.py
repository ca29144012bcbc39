"""Every reader of what others wrote, each as a function of bytes, with inputs to start from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx_sora
from mlx_sora.errors import WeightsError
from tests.fuzz import samples
from tests.fuzz.mutators import mutate_bytes, mutate_json, mutate_text
from tests.fuzz.shell import type_advice

Mutate = Callable[[bytes, int, int], bytes]


@dataclass(frozen=True)
class Target:
    """One reader. run: feeds it bytes, with a folder of its own for files."""

    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate = mutate_json
    limit: int = 1 << 16


def _safetensors(data: bytes, folder: Path) -> None:
    """Header and data of a file, then the tensors themselves by MLX."""
    import mlx.core as mx

    from mlx_sora.loading.safetensors import load_tensors, read_header, read_rows

    path = folder / "model.safetensors"
    path.write_bytes(data)
    tensors = read_header(path)
    arrays = load_tensors(path, tensors)
    for key, info in tensors.items():
        if info.dtype in ("F32", "BF16", "U32"):
            mx.eval(arrays[key])
        if info.dtype == "F32" and len(info.shape) == 2 and min(info.shape) > 0:
            read_rows(info, [0, info.shape[0] - 1])


def _header(data: bytes, folder: Path) -> None:
    """As `_safetensors`, `data` being the header alone, of 96 bytes of tensors."""
    _safetensors(struct.pack("<Q", len(data)) + data + bytes(96), folder)


def _index(data: bytes, folder: Path) -> None:
    from mlx_sora.loading.checkpoint import Checkpoint

    for name, content in samples.shards().items():
        (folder / name).write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(data)
    Checkpoint.open(folder)


@cache
def _model(folder: Path) -> Path:
    """A copy of the bundled model, by links, but for its small files."""
    from mlx_sora.loading.model_folder import BUNDLED, find_model

    source = find_model(BUNDLED).path
    for path in source.rglob("*"):
        place = folder / "model" / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if path.suffix == ".json":
                place.write_bytes(path.read_bytes())
            else:
                place.symlink_to(path)
    return folder / "model"


def _config(part: str) -> Callable[[bytes, Path], None]:
    """config.json of a part, against the weights of the bundled model."""

    def run(data: bytes, folder: Path) -> None:
        import mlx.core as mx

        from mlx_sora.loading import networks
        from mlx_sora.loading.checkpoint import Checkpoint
        from mlx_sora.loading.model_folder import Defaults, ModelFolder

        path = _model(folder)
        (path / part / "config.json").write_bytes(data)
        model = ModelFolder(path, "fuzzed", Defaults())
        networks.match_part(model, part, Checkpoint.open(path / part))
        if part == "vae":
            networks.load_vae(model)
        elif part == "transformer":
            networks.stream_transformer(model, mx.float32)
        else:
            networks.stream_text_encoder(model, mx.float32)

    return run


def _model_index(data: bytes, folder: Path) -> None:
    from mlx_sora.loading.model_folder import ModelFolder
    from mlx_sora.pipeline.settings import resolve
    from mlx_sora.request.generation import GenerationRequest

    path = _model(folder)
    (path / "model_index.json").write_bytes(data)
    request = GenerationRequest(prompt="a cat", seed=1)
    model = ModelFolder.open(path)
    resolve(request, model)
    model.card()


def _provenance(data: bytes, folder: Path) -> None:
    from mlx_sora.manage.doctor import repair_command
    from mlx_sora.manage.provenance import FILE, Provenance

    (folder / FILE).write_bytes(data)
    repair_command(folder)
    found = Provenance.read(folder)
    if found is not None:
        found.damaged_files(folder)


def _spiece(data: bytes, folder: Path) -> None:
    from mlx_sora.text.tokenizer import Tokenizer

    path = folder / "spiece.model"
    path.write_bytes(data)
    tokenizer = Tokenizer.load(path)
    tokenizer.encode("a red circle, moving right! </s> <extra_id_3> \u00e9t\u00e9 \uff1cpad\uff1e")


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
    preprocess((text * (20_000 // len(text) + 1))[:20_000])


def _tokens(data: bytes, folder: Path) -> None:
    from mlx_sora.text.tokenizer import Tokenizer

    path = folder / "spiece.model"
    if not path.exists():
        path.write_bytes(samples.spiece())
    Tokenizer.load(path).encode(_text(data))


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
        found.mask(clip)


def _options(data: bytes, folder: Path) -> None:
    """A JSON object of options, as far as a run gets without weights."""
    from mlx_sora.cli.flags import build_requests
    from mlx_sora.loading.model_folder import BUNDLED, find_model
    from mlx_sora.pipeline.settings import resolve
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
        resolve(request, find_model(BUNDLED))


def _words(data: bytes, folder: Path) -> None:
    """A text as the value of every option, and of what else is read from a word."""
    from mlx_sora.geometry import parse_frames, resolve_size
    from mlx_sora.manage.sources import choose_endpoint, choose_sources
    from mlx_sora.memory.profiles import parse_bytes, profile_budget
    from mlx_sora.request.generation import ANY_SIZE, options
    from mlx_sora.video.output_path import fill_template, frame_path, output_path

    text = _text(data)
    readers: list[Callable[[], Any]] = [
        *(lambda o=o: o.convert(text) for o in options().values()),
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


def _prompt_file(data: bytes, folder: Path) -> None:
    from mlx_sora.cli.requests import read_prompt_file

    path = folder / "many.jsonl"
    path.write_bytes(data)
    batch = read_prompt_file(str(path), {}, None)
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
    build_requests({}, recorded_options(str(path), {}))


def _metadata(suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        from mlx_sora.video.metadata import read_metadata

        path = folder / f"a{suffix}"
        path.write_bytes(data)
        read_metadata(path)

    return run


def _image(data: bytes, folder: Path) -> None:
    from mlx_sora.geometry import Size
    from mlx_sora.video.reader import image_size, read_image

    path = folder / "a.png"
    path.write_bytes(data)
    image_size(path)
    read_image(path, Size(64, 64))


def _video(data: bytes, folder: Path) -> None:
    from mlx_sora.geometry import Size
    from mlx_sora.video.reader import read_video

    path = folder / "a.mp4"
    path.write_bytes(data)
    read_video(path, 17, size=Size(64, 64))


def _table(data: bytes, folder: Path) -> None:
    from mlx_sora.accel.base import ScheduleInfo
    from mlx_sora.accel.schedules import read_schedule

    path = folder / "table.json"
    path.write_bytes(data)
    read_schedule(8, 0, ScheduleInfo(30, 1, 17, model=folder, size=(64, 64, 17)), str(path))


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


def _listing(data: bytes, folder: Path) -> None:
    """The hub's answer about a repository."""
    from unittest.mock import patch

    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    from mlx_sora.manage.hub import Hub
    from mlx_sora.manage.sources import SOURCES

    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return
    with patch.object(HfApi, "model_info", lambda *_, **__: ModelInfo(**answer)):
        for file in Hub("http://127.0.0.1:9").files(SOURCES[0]):
            inside = (folder / file.path).resolve()
            if folder.resolve() not in inside.parents:
                raise WeightsError(f"OUTSIDE {file.path}\n")


TARGETS: dict[str, Target] = {
    "header": Target(_header, samples.headers),
    "safetensors": Target(_safetensors, samples.safetensors, mutate_bytes),
    "index": Target(_index, samples.indexes),
    "config-t5": Target(_config("text_encoder"), lambda: samples.configs("text_encoder")),
    "config-stdit": Target(_config("transformer"), lambda: samples.configs("transformer")),
    "config-vae": Target(_config("vae"), lambda: samples.configs("vae")),
    "model-index": Target(_model_index, samples.model_indexes),
    "provenance": Target(_provenance, samples.provenances),
    "advice": Target(type_advice, samples.foreign_words, mutate_text, 1 << 11),
    "spiece": Target(_spiece, samples.spieces, mutate_bytes),
    "prompt": Target(_prompt, samples.prompts, mutate_text, 1 << 12),
    "repeated": Target(_repeated, samples.pieces, mutate_text, 24),
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
    *("accel.schedules", "cli.doctor", "cli.flags", "cli.requests", "conditioning.media"),
    *("loading.checkpoint", "loading.networks", "manage.doctor", "manage.hub"),
    *("pipeline.resume", "pipeline.settings", "text.prompt", "text.tokenizer"),
    *("video.containers", "video.metadata", "video.output_path", "video.reader"),
)
