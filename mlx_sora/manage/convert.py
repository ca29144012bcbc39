"""Converting a model folder: a file per streamed block, another type, quantised weights.

Files gather in a hidden folder beside the destination, each under its name only when it is whole,
and with a journal of their checksums; configurations come last, then the folder is renamed. So what
an interruption leaves never loads, and the next attempt goes on from it. In memory is one file's
content, and one tensor as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora import __version__
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.networks import match_part
from mlx_sora.loading.quantization import GROUP_SIZE
from mlx_sora.manage.conversion_plan import (
    INDEX,
    ConversionOptions,
    ShardPlan,
    index_text,
    other_files,
    plan_part,
    source_files,
)
from mlx_sora.manage.provenance import FILE, FileOrigin, Provenance
from mlx_sora.manage.staging import (
    disk_errors,
    folder_lock,
    is_free,
    refuse_unknown_files,
    replace_folder,
    require_disk_space,
)
from mlx_sora.memory.limits import memory_scope
from mlx_sora.utils.files import fsync, sha256

#: Checksums of the finished files, in the hidden folder until all are there.
JOURNAL = ".conversion.json"

#: What MLX may keep of freed buffers: a conversion uses none of them twice.
_CACHE_BYTES = 1 << 24

#: Told action (check, convert), part, bytes done and bytes in all.
ProgressCallback = Callable[[str, str, int, int], None]

_DISK = "Check rights and space, or name another destination."


@dataclass(frozen=True)
class ConversionResult:
    """Where the model is, its bytes, files kept from an earlier attempt, and whether any is new."""

    path: Path
    nbytes: int
    reused_files: int
    is_new: bool


@dataclass
class _Conversion:
    """One conversion under way. written: bytes and checksum of the finished shards by path."""

    model: ModelFolder
    options: ConversionOptions
    target: Path
    on_progress: ProgressCallback
    shards: Mapping[str, Sequence[ShardPlan]]
    record: Mapping[str, Any]
    finished: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def staging(self) -> Path:
        return staging_folder(self.target)

    def all_shards(self) -> list[ShardPlan]:
        return [shard for part in PARTS for shard in self.shards[part]]

    def reuse_finished(self) -> None:
        """Take what an earlier attempt at the same left behind, and remove all else."""
        journal = self._read_journal()
        known = {}
        for shard in self.all_shards():
            file, entry = self.staging / shard.path, journal.get(shard.path)
            if entry is not None and file.is_file() and file.stat().st_size == entry[0]:
                self.on_progress("check", shard.path, 0, entry[0])
                if sha256(file) == entry[1]:
                    known[shard.path] = entry
                self.on_progress("check", shard.path, entry[0], entry[0])
        for path in sorted(self.staging.rglob("*"), reverse=True):
            name = path.relative_to(self.staging).as_posix()
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif name not in known and name != JOURNAL:
                path.unlink()
        self.finished = known
        self._write_journal()

    def write_shards(self) -> None:
        """Write every shard that is not there yet."""
        for part in PARTS:
            (self.staging / part).mkdir(exist_ok=True)
            checkpoint = Checkpoint.open(self.model.path / part)
            total = sum(shard.source_bytes for shard in self.shards[part])
            done = 0
            for shard in self.shards[part]:
                if shard.path not in self.finished:
                    self._write_shard(shard, checkpoint, done, total)
                done += shard.source_bytes
                self.on_progress("convert", part, done, total)

    def finalize(self) -> int:
        """Indexes, configurations and provenance; then the folder gets its name. Its bytes."""
        files = dict(self.finished)
        texts = [(f"{part}/{INDEX}", index_text(self.shards[part]).encode()) for part in PARTS]
        for name, content in [*texts, *other_files(self.model, self.options)]:
            path = self.staging / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            fsync(path)
            files[name] = (len(content), hashlib.sha256(content).hexdigest())
        written = ModelFolder.open(self.staging)
        for part in PARTS:
            match_part(written, part, Checkpoint.open(self.staging / part))
        known = _read_origin(self.model.path)
        origins = {
            name: _file_origin(self.model, known, name, *facts) for name, facts in files.items()
        }
        model, endpoint = (known.model, known.endpoint) if known else (self.model.name, "")
        Provenance(model, endpoint, origins, self.record).write(self.staging)
        (self.staging / JOURNAL).unlink()
        replace_folder(self.staging, self.target)
        return sum(size for size, _ in files.values())

    def _write_shard(self, shard: ShardPlan, checkpoint: Checkpoint, done: int, total: int) -> None:
        arrays: dict[str, mx.array] = {}
        sources = checkpoint.load(change.key for change in shard.conversions)
        for change in shard.conversions:
            array = sources.pop(change.key)
            try:
                arrays |= change.apply(array)
            except RuntimeError as error:
                raise WeightsError(
                    f"cannot read {change.info.file}: {error}", "Get the model again."
                ) from error
            if change.quantization is not None and not mx.isfinite(array).all().item():
                raise WeightsError(
                    f"{change.key} in {change.info.file} holds NaN or Inf.",
                    f"Check the model: python -m mlx_sora doctor {self.model.path}",
                )
            del array
            done += change.info.nbytes
            self.on_progress("convert", shard.part, done, total)
        partial = self.staging / shard.part / ".partial.safetensors"
        try:
            mx.save_safetensors(str(partial), arrays, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise WeightsError(f"cannot write {partial}: {error}", _DISK) from error
        del arrays
        fsync(partial)
        facts = (partial.stat().st_size, sha256(partial))
        os.replace(partial, self.staging / shard.path)
        self.finished[shard.path] = facts
        self._write_journal()

    def _read_journal(self) -> dict[str, tuple[int, str]]:
        """Finished shards of an earlier attempt at just this conversion."""
        try:
            content = json.loads((self.staging / JOURNAL).read_text(encoding="utf-8"))
            if content["conversion"] != self.record:
                return {}
            return {str(path): (int(n), str(sha)) for path, (n, sha) in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write_journal(self) -> None:
        path = self.staging / JOURNAL
        partial = path.with_name(".journal.partial")
        content = {"conversion": self.record, "files": self.finished}
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, path)


def convert(
    model: ModelFolder,
    target: Path,
    options: ConversionOptions,
    *,
    overwrite: bool = False,
    check: bool = False,
    on_progress: ProgressCallback = lambda *_: None,
) -> ConversionResult:
    """Write `model`, changed as `choice` says, to the folder `target`.

    If this very conversion is there, each file of its size (check: and checksum), nothing is done;
    if damaged, it is replaced. Anything else is refused, or with overwrite replaced, at once when
    the new one is whole. Raises UsageError, and WeightsError for what is wrong with model or disk.
    """
    target = Path(os.path.abspath(target.expanduser()))
    with disk_errors(target, _DISK):
        _refuse_overlap(model.path.resolve(), target.resolve())
        shards = {part: plan_part(model, part, options) for part in PARTS}
        if options.bits is not None:
            _require_quantized(model, shards)
        record = _conversion_record(model, options, source_files(model, shards))
        if not is_free(target):
            present = Provenance.read(target) if target.is_dir() else None
            same = present is not None and dict(present.conversion) == record
            if same and present is not None and not _damaged(present, target, check, on_progress):
                size = sum(origin.bytes for origin in present.files.values())
                return ConversionResult(target, size, len(present.files), False)
            _refuse_existing(target, present, overwrite or same)
        work = _Conversion(model, options, target, on_progress, shards, record)
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(work.staging, "conversion"), memory_scope(_CACHE_BYTES):
            work.reuse_finished()
            kept = len(work.finished)
            missing = [s for s in work.all_shards() if s.path not in work.finished]
            require_disk_space(
                target.parent,
                sum(shard.nbytes for shard in missing),
                "written",
                "Make room, or name a destination on another disk.",
            )
            work.write_shards()
            return ConversionResult(target, work.finalize(), kept, True)


def staging_folder(target: Path) -> Path:
    """Where the files of a conversion to `target` gather."""
    return target.with_name(f".{target.name}.conversion")


def _conversion_record(
    model: ModelFolder, options: ConversionOptions, files: Sequence[Path]
) -> dict[str, Any]:
    """What makes a conversion the same: options, version, the source as it is and its origin."""
    stamps = [
        (str(file.relative_to(model.path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    ]
    known = _read_origin(model.path)
    origins = sorted((p, o.repo, o.revision) for p, o in known.files.items()) if known else []
    fingerprint = hashlib.sha256(json.dumps([stamps, origins]).encode()).hexdigest()
    quantization = options.quantization
    return {
        "source": str(model.path.resolve()),
        "fingerprint": fingerprint,
        "written_by": f"mlx_sora {__version__}",
        "dtype": options.dtype,
        "quantization": None if quantization is None else asdict(quantization),
    }


def _refuse_overlap(source: Path, target: Path) -> None:
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(
            f"{target} and the model in {source} overlap.", "Name a destination outside the model."
        )


def _require_quantized(model: ModelFolder, shards: Mapping[str, Sequence[ShardPlan]]) -> None:
    changes = (change for part in shards.values() for shard in part for change in shard.conversions)
    if all(change.quantization is None for change in changes):
        raise UsageError(
            f"No layer of {model.name} can be quantised: their inputs are no whole groups of "
            f"{GROUP_SIZE} weights.",
            "Convert it without --quantize.",
        )


def _damaged(present: Provenance, target: Path, check: bool, watch: ProgressCallback) -> list[str]:
    """Files that are not as recorded, by size or (check) by checksum."""
    if not check:
        return present.wrong_size(target)
    return present.wrong_checksum(target, lambda *facts: watch("check", *facts))


def _refuse_existing(target: Path, present: Provenance | None, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{target} exists.", "Add --overwrite, or name another destination.")
    if present is None:
        raise UsageError(
            f"{target} is no model that this program made, so --overwrite does not replace it.",
            "Move it away, or name another destination.",
        )
    refuse_unknown_files(target, {*present.files, FILE})


def _read_origin(path: Path) -> Provenance | None:
    """Where the source came from, if that is known."""
    with suppress(WeightsError):
        return Provenance.read(path)
    return None


def _file_origin(
    model: ModelFolder, known: Provenance | None, name: str, size: int, checksum: str
) -> FileOrigin:
    """Origin of a written file: repository, revision and folder of its part in the source."""
    part, _, file = name.rpartition("/")
    found = [o for p, o in known.files.items() if p.startswith(f"{part}/")] if known else []
    if not found or not part:
        return FileOrigin(model.name, "", name, size, checksum)
    folder = f"{found[0].folder}/" if found[0].folder else ""
    return FileOrigin(found[0].repo, found[0].revision, f"{folder}{file}", size, checksum)
