"""Conversion of a model folder: one file per streamed block, another type, quantized weights.

Files are built in a hidden folder beside the destination, with a journal of their checksums, so
that an interrupted conversion continues. Configurations come last, then the folder is renamed: a
partial conversion never loads. Memory holds the content of one file and one source tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora import __version__
from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import UsageError, WeightsError, shell_words
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.networks import match_part
from mlx_sora.loading.quantization import named_form
from mlx_sora.manage.conversion_plan import (
    INDEX,
    ConversionOptions,
    Gptq,
    ShardPlan,
    index_text,
    other_files,
    plan_part,
    source_files,
)
from mlx_sora.manage.progress import FileProgress, ProgressCallback, byte_counter, ignore_progress
from mlx_sora.manage.provenance import FileOrigin, Provenance
from mlx_sora.manage.staging import (
    disk_errors,
    folder_lock,
    is_free,
    refuse_unknown_files,
    replace_folder,
    require_disk_space,
    restore_folder,
)
from mlx_sora.manage.statistics import RECORDS, Statistics
from mlx_sora.memory.limits import memory_scope
from mlx_sora.models.quantized import AFFINE
from mlx_sora.pipeline.distill import distill
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.input_moments import measure_moments
from mlx_sora.pipeline.locks import model_lock
from mlx_sora.utils.files import atomic_write, fsync, sha256

#: Checksums of the finished files, in the hidden folder until the conversion is complete.
JOURNAL = ".conversion.json"

#: Size of MLX's buffer cache: a conversion uses no buffer twice.
_CACHE_BYTES = 1 << 24

_DISK_FIX = "Check rights and space, or name another destination."


@dataclass(frozen=True)
class ConversionResult:
    """A converted model.

    nbytes: size of its files. reused_files: finished by an earlier attempt. is_new: False if the
    conversion was already there.
    """

    path: Path
    nbytes: int
    reused_files: int
    is_new: bool


def convert(
    model: ModelFolder,
    target: Path,
    options: ConversionOptions,
    *,
    overwrite: bool = False,
    check: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> ConversionResult:
    """Write `model`, changed by `options`, to the folder `target`.

    An existing conversion of the same source and options is left alone if its file sizes (check:
    and checksums) are right, else replaced. Another model there is refused or, with overwrite,
    replaced when the new one is complete. Raises UsageError, and WeightsError for faults of the
    model or the disk.
    """
    target = Path(os.path.abspath(os.path.expanduser(target)))
    with disk_errors(target, _DISK_FIX):
        _refuse_overlap(model.path.resolve(), target.resolve())
        shards = [shard for part in PARTS for shard in plan_part(model, part, options)]
        if options.quantize is not None:
            _require_quantized(model, shards)
        if options.gptq is not None:
            _check_gptq(options.gptq, shards)
        record = _conversion_record(model, options, source_files(model, options, shards))
        restore_folder(target)
        if not is_free(target):
            present = Provenance.read(target) if target.is_dir() else None
            same = present is not None and dict(present.conversion) == record
            if same and present and not present.damaged_files(target, check, on_progress):
                if check:
                    Statistics.measure(target, on_progress).write(target)
                return ConversionResult(target, present.nbytes, len(present.files), False)
            _refuse_existing(target, present, overwrite or same)
        conversion = _Conversion(model, options, target, on_progress, shards, record)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            model_lock(model.path),
            folder_lock(conversion.staging, "conversion"),
            memory_scope(_CACHE_BYTES),
        ):
            conversion.reuse_finished()
            reused = len(conversion.finished)
            require_disk_space(
                target.parent,
                sum(shard.nbytes for shard in shards if shard.path not in conversion.finished),
                "written",
                "Make room, or name a destination on another disk.",
            )
            conversion.write_shards()
            return ConversionResult(target, conversion.finalize(), reused, True)


def staging_folder(target: Path) -> Path:
    """Return the hidden folder in which a conversion to `target` is built."""
    return target.with_name(f".{target.name}.conversion")


@dataclass
class _Conversion:
    """A conversion in progress. finished: size and checksum of the finished shards, by path."""

    model: ModelFolder
    options: ConversionOptions
    target: Path
    on_progress: ProgressCallback
    shards: Sequence[ShardPlan]
    record: Mapping[str, Any]
    finished: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def staging(self) -> Path:
        return staging_folder(self.target)

    def part_shards(self, part: str) -> list[ShardPlan]:
        return [shard for shard in self.shards if shard.part == part]

    def reuse_finished(self) -> None:
        """Keep the finished shards of an earlier attempt; remove all other files."""
        journal = self._read_journal()
        self.finished = {}
        for shard in self.shards:
            file, entry = self.staging / shard.path, journal.get(shard.path)
            if entry is not None and file.is_file() and file.stat().st_size == entry[0]:
                counter = byte_counter(self.on_progress, "check", shard.path, entry[0])
                if sha256(file, counter) == entry[1]:
                    self.finished[shard.path] = entry
        for path in sorted(self.staging.rglob("*"), reverse=True):
            name = path.relative_to(self.staging).as_posix()
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif name not in self.finished and name != JOURNAL:
                path.unlink()
        self._write_journal()

    def write_shards(self) -> None:
        """Write every shard that is missing."""
        for part in PARTS:
            (self.staging / part).mkdir(exist_ok=True)
            checkpoint = Checkpoint.open(self.model.path / part)
            shards = self.part_shards(part)
            done, total = 0, sum(shard.source_bytes for shard in shards)
            moments = self._measure_moments(
                part, [s for s in shards if s.path not in self.finished]
            )
            for shard in shards:
                if shard.path not in self.finished:
                    self._write_shard(shard, checkpoint, next(moments), done, total)
                done += shard.source_bytes
                self.on_progress(FileProgress("convert", part, done, total))

    def _measure_moments(
        self, part: str, shards: Sequence[ShardPlan]
    ) -> Iterator[Mapping[str, mx.array]]:
        """Yield the moments of the inputs of each shard's layers; none without compensation."""
        gptq = self.options.gptq
        if gptq is None or not any(shard.quantized_inputs for shard in shards):
            return repeat({}, len(shards))
        requests = gptq.requests()
        counter = byte_counter(self.on_progress, "calibrate", part, len(requests))
        layers = [shard.quantized_inputs for shard in shards]
        engine = Engine(self.model, "auto", Ranks())
        return measure_moments(engine, requests, part, layers, counter)

    def _distill(self, written: ModelFolder, gptq: Gptq) -> dict[str, tuple[int, str]]:
        """Let the transformer in `written` learn; write its shards again, return their facts.

        The journal still has the checksums from before: an interrupted conversion makes them anew.
        """
        requests, steps = gptq.requests(), gptq.distill
        counter = byte_counter(self.on_progress, "distill", "transformer", len(requests) + steps)
        learned = distill(self.model, written, requests, steps, counter)
        files: dict[str, tuple[int, str]] = {}
        for shard in self.part_shards("transformer"):
            arrays = mx.load(str(self.staging / shard.path), format="safetensors")
            assert isinstance(arrays, dict)
            new = {name: value for name, value in learned.items() if name in arrays}
            arrays |= {name: value.astype(arrays[name].dtype) for name, value in new.items()}
            mx.eval(arrays)  # they are read from the file that is replaced
            files[shard.path] = self._save(shard, arrays)
        return files

    def finalize(self) -> int:
        """Write all other files, rename the folder to `target`, and return its size in bytes."""
        files = dict(self.finished)
        texts = [(f"{part}/{INDEX}", index_text(self.part_shards(part)).encode()) for part in PARTS]
        for name, content in [*texts, *other_files(self.model, self.options)]:
            path = self.staging / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            fsync(path)
            files[name] = (len(content), hashlib.sha256(content).hexdigest())
        written = ModelFolder.open(self.staging)
        if self.options.gptq is not None and self.options.gptq.distill:
            files |= self._distill(written, self.options.gptq)
        for part in PARTS:
            match_part(written, part, Checkpoint.open(self.staging / part))
        source = _read_provenance(self.model.path)
        Statistics.measure(self.staging, self.on_progress).write(self.staging)
        origins = {
            name: _file_origin(self.model, source, name, *file) for name, file in files.items()
        }
        model, endpoint = (source.model, source.endpoint) if source else (self.model.name, "")
        Provenance(model, endpoint, origins, self.record).write(self.staging)
        (self.staging / JOURNAL).unlink()
        replace_folder(self.staging, self.target)
        return sum(size for size, _ in files.values())

    def _write_shard(
        self,
        shard: ShardPlan,
        checkpoint: Checkpoint,
        moments: Mapping[str, mx.array],
        done: int,
        total: int,
    ) -> None:
        arrays: dict[str, mx.array] = {}
        sources = checkpoint.load(conversion.key for conversion in shard.conversions)
        for conversion in shard.conversions:
            array = sources.pop(conversion.key)
            try:
                arrays |= conversion.apply(array, moments.get(conversion.path))
            except RuntimeError as error:
                raise WeightsError(
                    f"cannot read {conversion.info.file}: {error}", "Get the model again."
                ) from error
            if conversion.quantization is not None and not mx.isfinite(array).all().item():
                raise WeightsError(
                    f"{conversion.key} in {conversion.info.file} holds NaN or Inf.",
                    f"Check the model: python -m mlx_sora doctor {shell_words(self.model.path)}",
                )
            del array
            done += conversion.info.nbytes
            self.on_progress(FileProgress("convert", shard.part, done, total))
        self.finished[shard.path] = self._save(shard, arrays)
        self._write_journal()

    def _save(self, shard: ShardPlan, arrays: dict[str, mx.array]) -> tuple[int, str]:
        """Write the file of a shard; return its size and checksum."""
        path = self.staging / shard.path
        with atomic_write(path, overwrite=True, error=WeightsError) as file:
            try:
                with file.partial.open("wb") as handle:
                    mx.save_safetensors(handle, arrays, metadata={"format": "mlx"})
            except RuntimeError as error:
                raise WeightsError(f"cannot write {path}: {error}", _DISK_FIX) from error
            return file.partial.stat().st_size, sha256(file.partial)

    def _read_journal(self) -> dict[str, tuple[int, str]]:
        """Return the finished shards of an earlier attempt at the same conversion."""
        try:
            content = json.loads((self.staging / JOURNAL).read_text(encoding="utf-8"))
            if content["conversion"] != self.record:
                return {}
            return {str(path): (int(n), str(sha)) for path, (n, sha) in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write_journal(self) -> None:
        content = {"conversion": self.record, "files": self.finished}
        with atomic_write(self.staging / JOURNAL, overwrite=True, error=WeightsError) as file:
            file.partial.write_text(json.dumps(content), encoding="utf-8")


def _conversion_record(
    model: ModelFolder, options: ConversionOptions, files: Sequence[Path]
) -> dict[str, Any]:
    """Return what identifies a conversion: options, version, source files and their origin."""
    stats = [
        (str(file.relative_to(model.path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    ]
    source = _read_provenance(model.path)
    origins = sorted((p, o.repo, o.revision) for p, o in source.files.items()) if source else []
    fingerprint = hashlib.sha256(json.dumps([stats, origins]).encode()).hexdigest()
    quantize = options.quantize
    # An interrupted conversion of an older version, which left the table as it is, begins anew.
    tables = {} if quantize is None else {"token_table": "quantized"}
    return tables | {
        "source": str(model.path.resolve()),
        "fingerprint": fingerprint,
        "written_by": f"mlx_sora {__version__}",
        "dtype": options.dtype,
        "quantization": named_form(quantize).to_dict() if isinstance(quantize, int) else quantize,
        **({} if options.gptq is None else {"gptq": options.gptq.to_dict()}),
    }


def _refuse_overlap(source: Path, target: Path) -> None:
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(
            f"{target} and the model in {source} overlap.", "Name a destination outside the model."
        )


def _require_quantized(model: ModelFolder, shards: Sequence[ShardPlan]) -> None:
    if all(tensor.quantization is None for shard in shards for tensor in shard.conversions):
        raise UsageError(
            f"No layer of {model.name} can be quantized: no input size is a multiple of the size "
            "of a group.",
            "Convert it without --quantize.",
        )


def _check_gptq(gptq: Gptq, shards: Sequence[ShardPlan]) -> None:
    if gptq.distill < 0:
        raise UsageError(
            f"--distill must be 0 or more, not {gptq.distill}.",
            "Give --distill 600, or leave it out.",
        )
    if gptq.distill and not any(s.quantized_inputs for s in shards if s.part == "transformer"):
        raise UsageError("--distill is for a quantized transformer.", "Add --quantize 4.")
    for request in gptq.requests():
        request.validate()
    for form in (tensor.quantization for shard in shards for tensor in shard.conversions):
        if form is not None and form.mode != AFFINE:
            raise UsageError(
                f"--gptq does not round to {form.mode}.",
                "Give bits, such as --quantize 4, or leave --gptq out.",
            )


def _refuse_existing(target: Path, present: Provenance | None, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{target} exists.", "Add --overwrite, or name another destination.")
    if present is None:
        raise UsageError(
            f"{target} was not written by this program, so --overwrite does not replace it.",
            "Move it away, or name another destination.",
        )
    refuse_unknown_files(target, {*present.files, *RECORDS})


def _read_provenance(path: Path) -> Provenance | None:
    with suppress(WeightsError):
        return Provenance.read(path)
    return None


def _file_origin(
    model: ModelFolder, source: Provenance | None, name: str, size: int, checksum: str
) -> FileOrigin:
    """Return the origin of a written file: that of its part in the source, if known."""
    part, _, file = name.rpartition("/")
    origins = source.part_origins(part) if source and part else []
    if not origins:
        return FileOrigin(model.name, "", name, size, checksum)
    folder = f"{origins[0].folder}/" if origins[0].folder else ""
    return FileOrigin(origins[0].repo, origins[0].revision, f"{folder}{file}", size, checksum)
