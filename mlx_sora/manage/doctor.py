"""Diagnosis of a model folder, with the command that repairs each fault.

Checks run from cheap to thorough: parts, configurations, names and shapes, compatibility of the
parts; then, unless `quick`, checksums, values and one block of each network. A part that fails a
check skips the later ones, which would only repeat the fault.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.accel.schedules import FOLDER, read_table, table_path
from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import MemoryBudgetError, MlxSoraError, UsageError, WeightsError, shell_words
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import (
    BUNDLED,
    MODEL_NAMES,
    PARTS,
    PUBLISHED,
    Defaults,
    ModelFolder,
    bundled_folder,
    download_command,
    missing_parts,
    model_names,
    model_path,
    other_model_fix,
)
from mlx_sora.loading.networks import match_part
from mlx_sora.loading.other_models import describe_other_model
from mlx_sora.loading.preview_map import load_preview_map
from mlx_sora.loading.quantization import NetworkQuantization, count_parameters
from mlx_sora.loading.safetensors import FLOATS, TensorInfo, memory_dtype
from mlx_sora.manage.conversion_plan import Gptq
from mlx_sora.manage.convert import staging_folder
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.progress import ProgressCallback, ignore_progress
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.records import Diagnostic, RecordChecker
from mlx_sora.manage.smoke_test import run_text_encoder, run_transformer, run_vae
from mlx_sora.manage.statistics import measure_tensor, sha256_of
from mlx_sora.models import stdit3, t5
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import prepare
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.device import blas_notice, describe_machine, total_memory
from mlx_sora.text.tokenizer import PUBLISHED_IDS, Tokenizer
from mlx_sora.utils.files import visible_files

#: A request of the model's defaults.
_DEFAULTS = GenerationRequest(prompt="a test", seed=0, output=None, memory_budget="off")

#: Values of T5 that shape no tensor, which every T5 v1.1 has in common.
_T5_CONSTANTS = (
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    "layer_norm_epsilon",
)

#: Types that names of folders and files promise.
_TYPE_NAMES = (
    dict.fromkeys(("bf16", "bfloat16"), "BF16")
    | dict.fromkeys(("fp16", "f16", "float16"), "F16")
    | dict.fromkeys(("fp32", "f32", "float32"), "F32")
)

#: Bytes of a model whose reading takes minutes, and bytes to measure the speed with.
_LARGE, _SAMPLE = 2_000_000_000, 1 << 26

_SMOKE_TESTS = {"text_encoder": run_text_encoder, "transformer": run_transformer, "vae": run_vae}


def diagnose(
    path: Path, *, quick: bool = False, on_progress: ProgressCallback = ignore_progress
) -> Iterator[Diagnostic]:
    """Check the model folder `path` and the machine; yield results as they are found.

    quick: read configurations and headers only.
    """
    yield from ModelChecker(path, quick, on_progress).run()
    yield from check_machine(path)


def describe_part(
    checkpoint: Checkpoint, quantization: NetworkQuantization | None
) -> dict[str, Any]:
    """Return parameters, bytes, types, files and, if any, quantization of a part."""
    types = Counter(info.dtype for info in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "parameters": count_parameters(checkpoint, quantization),
        "bytes": checkpoint.nbytes,
        "types": ", ".join(f"{count} {dtype}" for dtype, count in types.most_common()),
        "files": len({info.file for info in checkpoint.tensors.values()}),
    }
    return facts | ({} if quantization is None else {"quantization": str(quantization)})


@dataclass
class ModelChecker:
    """Checks of the model folder `path`. failed: parts with an error."""

    path: Path
    quick: bool
    on_progress: ProgressCallback = ignore_progress
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._records = RecordChecker(self.path, self.quick, self.on_progress, self._error)

    def run(self) -> Iterator[Diagnostic]:
        """Run all checks in order."""
        yield from self._check_files()
        if not self.path.is_dir():
            return
        yield from self._check_weights()
        yield from self._check_compatibility()
        yield from self._check_settings()
        if not self.quick:
            yield from foresee_reading(self.path)
        yield from self._records.check_files()
        if not self.quick:
            yield from self._check_values()
            yield from self._records.settle()
            yield from self._run_smoke_tests()

    @property
    def _model(self) -> ModelFolder:
        return ModelFolder(self.path, self.path.name, Defaults())

    def _sound_parts(self) -> list[str]:
        return [part for part in PARTS if part not in self.failed]

    def _error(self, part: str, message: str) -> Diagnostic:
        self.failed.add(part)
        return Diagnostic("error", part, message, repair_command(self.path))

    def _check_files(self) -> Iterator[Diagnostic]:
        if not self.path.exists():
            yield self._error("folder", f"there is no model folder at {self.path}.")
            staging = self.path.parent / STAGING
            if self.path.name == PUBLISHED and staging.is_dir():
                yield Diagnostic("note", "folder", "an interrupted download can be continued.")
            if staging_folder(self.path).is_dir():
                yield Diagnostic("note", "folder", "an interrupted conversion can be continued.")
            return
        other = describe_other_model(self.path)
        if other is not None:
            self.failed.update(PARTS, ["tokenizer"])
            message, fix = f"{self.path} {other}.", other_model_fix(self.path)
            yield Diagnostic("error", "folder", message, fix)
            return
        missing = missing_parts(self.path)
        for name in missing:
            yield self._error(name.split("/")[0], f"{name} is missing.")
        if not missing:
            yield Diagnostic("ok", "folder", f"all parts are in {self.path}.")

    def _check_weights(self) -> Iterator[Diagnostic]:
        """Compare names, shapes and types in the headers with the configurations."""
        for part in self._sound_parts():
            try:
                checkpoint = Checkpoint.open(self.path / part)
                match_part(self._model, part, checkpoint)
                quantization = NetworkQuantization.from_config(self._model.config(part))
            except MlxSoraError as error:
                yield self._error(part, error.message)
                continue
            facts = describe_part(checkpoint, quantization)
            size = f"{facts['parameters']:,} values, {facts['bytes'] / 1e6:,.1f} MB"
            suffix = "" if quantization is None else f", quantized to {quantization}"
            message = f"fits its configuration: {facts['types']} tensors, {size}{suffix}."
            yield Diagnostic("ok", part, message)

    def _check_compatibility(self) -> Iterator[Diagnostic]:
        """Check the tokenizer, and that the text encoder knows its ids."""
        if "tokenizer" in self.failed:
            return
        try:
            tokenizer = Tokenizer.load(self.path / "tokenizer" / "spiece.model")
        except MlxSoraError as error:
            yield self._error("tokenizer", error.message)
            return
        count = tokenizer.vocab_size
        if tokenizer.is_published:
            yield Diagnostic("ok", "tokenizer", f"T5's, {count} ids.")
        elif count == PUBLISHED_IDS:
            message = "has as many ids as T5's, but other pieces, scores or replacements."
            yield self._error("tokenizer", message)
        else:
            yield Diagnostic("note", "tokenizer", f"loads, {count} ids; it is not T5's.")
        if "text_encoder" not in self.failed:
            rows = t5.T5Config.from_dict(self._model.config("text_encoder")).vocab_size
            if count > rows:
                message = f"has {count} ids, and the text encoder {rows} rows."
                yield self._error("tokenizer", message)

    def _check_settings(self) -> Iterator[Diagnostic]:
        """Plan a run of the defaults, as generate does, and read what else the folder holds."""
        if self.failed:
            return
        try:
            model = ModelFolder.open(self.path)
            with suppress(MemoryBudgetError):  # which is not for the model to mend
                prepare(Engine(model, "auto", Ranks()), _DEFAULTS)
            channels = stdit3.STDiT3Config.from_dict(model.config("transformer")).in_channels
            load_preview_map(model, channels)
            for file in visible_files(self.path / FOLDER, "*.json"):
                table = read_table(file)
                size = (table.width, table.height, table.num_frames)
                if table_path(self.path, table.steps, size) != file:
                    raise UsageError(f"{file} is the table of another size or number of steps.")
        except MlxSoraError as error:
            yield self._error("settings", error.message)
            return
        yield Diagnostic("ok", "settings", "generate accepts them.")
        for part, message in [*unusual_constants(model), *broken_promises(model)]:
            yield Diagnostic("warning", part, message)

    def _check_values(self) -> Iterator[Diagnostic]:
        """Look for NaN, Inf and values that are not as recorded."""
        for part in self._sound_parts():
            try:
                yield from self._records.check_tensors(part)
            except OSError as error:
                yield self._error(part, f"cannot be read: {error.strerror or error}.")
            if part not in self.failed:
                yield Diagnostic("ok", part, "no NaN or Inf" + self._records.proof(part))

    def _run_smoke_tests(self) -> Iterator[Diagnostic]:
        for part in self._sound_parts():
            try:
                _SMOKE_TESTS[part](self._model)
            except MlxSoraError as error:
                yield self._error(part, f"fails its smoke test: {error.message}")
            except (RuntimeError, ValueError, ArithmeticError) as error:
                reason = " ".join(str(error).split())[:200]
                yield self._error(part, f"fails its smoke test, config.json may be wrong: {reason}")
            else:
                message = "passes its smoke test: one block gives finite, varied output."
                yield Diagnostic("ok", part, message)


def unusual_constants(model: ModelFolder) -> Iterator[tuple[str, str]]:
    """Yield part and message for constants of T5 that no tensor shows, and all models share."""
    found, usual = t5.T5Config.from_dict(model.config("text_encoder")), t5.T5Config()
    for name in _T5_CONSTANTS:
        value, expected = getattr(found, name), getattr(usual, name)
        if value != expected:
            yield "text_encoder", f"{name} is {value}, and {expected} in every published T5."


def broken_promises(model: ModelFolder) -> Iterator[tuple[str, str]]:
    """Yield part and message where a name of folder or file promises another type than it has."""
    folder = model.path.resolve().name
    bits = re.search(r"(?:^|[-_.])([34568])[-_]?bit$", folder)
    for part in PARTS:
        quantization = NetworkQuantization.from_config(model.config(part))
        tensors = model.checkpoint(part).tensors.values()
        widths = {form.bits for form in quantization.forms} if quantization else set()
        if bits and part != "vae" and widths != {int(bits[1])}:
            found = "not quantized" if quantization is None else f"quantized to {quantization}"
            yield part, f"is {found}, and the folder's name says {bits[1]} bits."
        sizes = Counter[str]()
        for info in tensors:
            sizes[info.dtype] += info.nbytes * (info.dtype in FLOATS)
        most = sizes.most_common(1)[0][0]
        names = {info.file.stem for info in tensors}
        for name in sorted(names | {folder} if part == "transformer" else names):
            promised = re.search(rf"(?:^|[-_.])({'|'.join(_TYPE_NAMES)})$", name.lower())
            if promised and _TYPE_NAMES[promised[1]] != most:
                yield part, f"is mostly {most}, and the name {name} says {promised[1]}."


def foresee_reading(path: Path, clock: Callable[[], float] = time.perf_counter) -> list[Diagnostic]:
    """Return a note with the time that reading a large model takes, from a part of one tensor."""
    tensors: list[TensorInfo] = []
    for part in PARTS:
        with suppress(MlxSoraError):
            tensors += Checkpoint.open(path / part).tensors.values()
    total = sum(info.nbytes for info in tensors)
    floats = [info for info in tensors if info.dtype in FLOATS and len(info.shape) > 1]
    if total < _LARGE or not floats:
        return []
    largest = max(floats, key=lambda info: info.nbytes)
    rows = max(1, largest.shape[0] * _SAMPLE // largest.nbytes)
    width = largest.nbytes // max(1, largest.shape[0])
    sample = replace(largest, shape=(rows, *largest.shape[1:]), nbytes=rows * width)
    start = clock()
    measure_tensor(sample)
    sha256_of(sample)
    seconds = (clock() - start) * total / sample.nbytes
    message = f"{total / 1e9:.1f} GB are to be read, in about {max(1, round(seconds / 60))} minutes"
    return [Diagnostic("note", "folder", f"{message}; --quick leaves that out.")]


def check_machine(path: Path) -> Iterator[Diagnostic]:
    """Describe the machine, and warn if the largest part does not fit into its memory."""
    facts = describe_machine()
    names = f"{facts['device']} ({facts['backend']}), {facts['dtype']}"
    blas = f", matrix products by {facts['blas']}" if facts["backend"] == "cpu" else ""
    memory = total_memory()
    yield Diagnostic("ok", "machine", f"{names}{blas}, {memory / 1e9:.1f} GB of memory.")
    notice = blas_notice()
    if notice:
        yield Diagnostic("warning", "machine", notice)
    needed, dtype = 0, getattr(mx, str(facts["dtype"]))
    for part in PARTS:
        with suppress(MlxSoraError):
            tensors = Checkpoint.open(path / part).tensors.values()
            sizes = (prod(i.shape) * memory_dtype(i.dtype, dtype).size for i in tensors)
            needed = max(needed, sum(sizes))
    if needed > memory:
        message = f"the largest part needs {needed / 1e9:.1f} GB as {facts['dtype']}."
        yield Diagnostic("warning", "machine", message)


def find_folder(model: str | None) -> Path:
    """Return the folder of a model name or path, even if it is missing or incomplete."""
    return model_path(next(iter(model_names()), BUNDLED) if model is None else model)


def repair_command(path: Path) -> str:
    """Return the command that repairs the model in `path`, or advice if there is none."""
    place = path.resolve()
    name = next((name for name in MODEL_NAMES if place == model_path(name).resolve()), None)
    if name == BUNDLED:
        clone = bundled_folder().parents[1]
        if (clone / ".git").exists():
            return shell_words("git", "-C", clone, "checkout", "--", f"weights/{BUNDLED}")
        return "install mlx_sora again: pip has --force-reinstall, pipx reinstall, uv --reinstall."
    provenance = None
    with suppress(WeightsError):
        provenance = Provenance.read(path)
    if name in (None, PUBLISHED) and provenance is not None and provenance.conversion:
        return _conversion_command(provenance, path)
    if name is None:
        advice = "copy the folder again from its source."
        return advice if path.exists() else f"give {', '.join(MODEL_NAMES)} or a folder's path."
    command = download_command(name)
    if not path.exists():
        return command
    if provenance is not None:
        return f"{command} --check"
    return f"mv {shell_words(path, f'{path}.old')} && {command}"


def _conversion_command(provenance: Provenance, path: Path) -> str:
    source, dtype = str(provenance.conversion["source"]), provenance.conversion["dtype"]
    if not os.path.isabs(source) or not os.path.isdir(source):  # any text, from the record
        return "convert its source again; the folder that it came from is gone."
    words = ["convert", source, path]
    quantization = provenance.conversion["quantization"]
    bits = quantization["bits"] if isinstance(quantization, dict) else quantization
    words += ["--quantize", bits] if quantization else []
    words += ["--dtype", dtype] if dtype else []
    if gptq := provenance.conversion.get("gptq"):
        words += ["--gptq", "--steps", gptq["steps"]]
        words += ["--distill", gptq["distill"]] if "distill" in gptq else []
        usual: tuple[str, ...] = ()
        with suppress(MlxSoraError):
            usual = Gptq.suggested(ModelFolder.open(source).card)
        if gptq["prompts"] != list(usual):
            words += [f"--prompt={text}" for text in gptq["prompts"]]
    return f"python -m mlx_sora {shell_words(*words, '--check', '--overwrite')}"
