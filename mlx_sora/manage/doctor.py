"""Diagnosis of a model folder, with the command that repairs each fault.

Checks run from cheap to thorough: parts, configurations, names and shapes, compatibility of the
parts; then, unless `quick`, checksums, values and one block of each network. A part that fails a
check skips the later ones, which would only repeat the fault.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.errors import MlxSoraError, WeightsError, shell_words
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import (
    BUNDLED,
    MODEL_NAMES,
    PARTS,
    PUBLISHED,
    Defaults,
    ModelFolder,
    download_command,
    expand_folder,
    missing_parts,
    other_model_fix,
    weights_root,
)
from mlx_sora.loading.networks import match_part
from mlx_sora.loading.other_models import describe_other_model
from mlx_sora.loading.quantization import Quantization, count_parameters
from mlx_sora.loading.safetensors import memory_dtype
from mlx_sora.manage.convert import staging_folder
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.progress import ProgressCallback, byte_counter, ignore_progress
from mlx_sora.manage.provenance import FILE, Provenance
from mlx_sora.manage.smoke_test import (
    ValueCounts,
    count_bad_values,
    run_text_encoder,
    run_transformer,
    run_vae,
)
from mlx_sora.models import stdit3, t5, vae
from mlx_sora.runtime.device import blas_notice, describe_machine, total_memory
from mlx_sora.text.tokenizer import Tokenizer

_SMOKE_TESTS = {"text_encoder": run_text_encoder, "transformer": run_transformer, "vae": run_vae}


@dataclass(frozen=True)
class Diagnostic:
    """One line of the report. level: ok, note, warning or error; fix: the repair command."""

    level: str
    subject: str
    message: str
    fix: str = ""


def diagnose(
    path: Path, *, quick: bool = False, on_progress: ProgressCallback = ignore_progress
) -> Iterator[Diagnostic]:
    """Check the model folder `path` and the machine; yield results as they are found.

    quick: read configurations and headers only.
    """
    yield from ModelChecker(path, quick, on_progress).run()
    yield from check_machine(path)


def describe_part(checkpoint: Checkpoint, quantization: Quantization | None) -> dict[str, Any]:
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

    def run(self) -> Iterator[Diagnostic]:
        """Run all checks in order."""
        yield from self._check_files()
        if not self.path.is_dir():
            return
        yield from self._check_weights()
        yield from self._check_compatibility()
        yield from self._check_provenance()
        if not self.quick:
            yield from self._check_values()
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
                quantization = Quantization.from_config(self._model.config(part))
            except MlxSoraError as error:
                yield self._error(part, error.message)
                continue
            facts = describe_part(checkpoint, quantization)
            size = f"{facts['parameters']:,} values, {facts['bytes'] / 1e6:,.1f} MB"
            suffix = "" if quantization is None else f", quantized to {quantization}"
            message = f"fits its configuration: {facts['types']} tensors, {size}{suffix}."
            yield Diagnostic("ok", part, message)

    def _check_compatibility(self) -> Iterator[Diagnostic]:
        """Check that the parts belong to one model."""
        if "tokenizer" not in self.failed:
            try:
                vocabulary = Tokenizer.load(self.path / "tokenizer" / "spiece.model").vocab_size
            except MlxSoraError as error:
                yield self._error("tokenizer", error.message)
            else:
                yield Diagnostic("ok", "tokenizer", f"loads, {vocabulary} ids.")
        if self.failed & {*PARTS, "tokenizer"}:
            return
        model = self._model
        text = t5.T5Config.from_dict(model.config("text_encoder"))
        video = stdit3.STDiT3Config.from_dict(model.config("transformer"))
        latent = vae.VAEConfig.from_dict(model.config("vae"))
        pairs = [
            ("tokenizer ids", vocabulary, "rows of the text encoder", text.vocab_size),
            ("text encoder channels", text.d_model, "caption channels", video.caption_channels),
            ("VAE channels", latent.temporal.embed_dim, "latent channels", video.in_channels),
        ]
        for index, (name, found, other, expected) in enumerate(pairs):
            if found > expected or (index > 0 and found != expected):
                message = f"parts of different models: {found} {name}, {expected} {other}."
                yield self._error("folder", message)

    def _check_provenance(self) -> Iterator[Diagnostic]:
        """Compare sizes and, unless quick, checksums with the record."""
        try:
            provenance = Provenance.read(self.path)
        except WeightsError as error:
            yield self._error("files", error.message)
            return
        if provenance is None:
            yield Diagnostic("note", "files", f"no {FILE}, so there are no checksums to compare.")
            return
        resized = provenance.damaged_files(self.path)
        for name in resized:
            yield self._error(name.split("/")[0], f"{name} does not have the recorded size.")
        damaged = provenance.damaged_files(self.path, not self.quick, self.on_progress)
        for name in damaged:
            if name not in resized:
                message = f"{name} does not have the recorded checksum."
                yield self._error(name.split("/")[0], message)
        if not damaged:
            checks = "sizes" if self.quick else "sizes and checksums"
            origin = ", ".join(sorted({o.repo for o in provenance.files.values()}))
            yield Diagnostic("ok", "files", f"{checks} as recorded, from {origin}.")

    def _check_values(self) -> Iterator[Diagnostic]:
        """Look for NaN, Inf and tensors of zeros."""
        for part in self._sound_parts():
            checkpoint = Checkpoint.open(self.path / part)
            done = 0
            for key, info in checkpoint.tensors.items():
                counter = byte_counter(self.on_progress, "scan", part, checkpoint.nbytes, done)
                values = count_bad_values(info, counter)
                done += info.nbytes
                if values.nan or values.inf:
                    yield self._error(part, f"{key} in {info.file.name}: {_format_counts(values)}.")
                elif values.all_zero and len(info.shape) > 1:
                    message = f"{key} in {info.file.name} is all zeros, which is unusual."
                    yield Diagnostic("warning", part, message)
            if part not in self.failed:
                yield Diagnostic("ok", part, "no NaN or Inf.")

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
    root = weights_root()
    if model is None:
        return root / next((name for name in MODEL_NAMES if (root / name).is_dir()), BUNDLED)
    return root / model if model in MODEL_NAMES else expand_folder(model)


def repair_command(path: Path) -> str:
    """Return the command that repairs the model in `path`, or advice if there is none."""
    place, root = path.resolve(), weights_root()
    name = next((name for name in MODEL_NAMES if place == (root / name).resolve()), None)
    if name == BUNDLED:
        return f"git checkout -- weights/{BUNDLED}"
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
    words += ["--quantize", quantization["bits"]] if quantization else []
    words += ["--dtype", dtype] if dtype else []
    return f"python -m mlx_sora {shell_words(*words, '--check', '--overwrite')}"


def _format_counts(values: ValueCounts) -> str:
    counts = [(values.nan, "NaN"), (values.inf, "Inf")]
    return " and ".join(f"{n} {name}" for n, name in counts if n)
