"""Getting the published model: all of it under its name, or nothing.

Files gather in a hidden folder beside the model's place, each under a `.part` name until its
checksum fits. When all are there and open as a model, that folder is renamed to the model's. So an
interrupted download is never taken for a model, and the next one continues it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import (
    PUBLISHED,
    QUANTIZED_MODELS,
    WEIGHTS_VARIABLE,
    ModelFolder,
    missing_parts,
)
from mlx_sora.loading.quantization import Quantization
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import ConversionResult, convert
from mlx_sora.manage.hub import Hub, RemoteFile
from mlx_sora.manage.provenance import FILE, FileOrigin, Provenance
from mlx_sora.manage.sources import PartSource
from mlx_sora.manage.staging import (
    disk_errors,
    folder_lock,
    is_free,
    refuse_unknown_files,
    replace_folder,
    require_disk_space,
)
from mlx_sora.utils.files import fsync
from mlx_sora.utils.json import read_object

#: Hidden, and never a name that `--model` knows.
STAGING = f".{PUBLISHED}.download"

_FIX = f"Check rights and space, or set {WEIGHTS_VARIABLE} to another folder."
_SPACE = f"Make room, or set {WEIGHTS_VARIABLE} to a folder on another disk."


@dataclass(frozen=True)
class DownloadProgress:
    """`done` of `total` bytes of the file `path` are checked (action "check") or here ("fetch")."""

    action: str
    path: str
    done: int
    total: int


#: Told what happens, file by file.
ProgressCallback = Callable[[DownloadProgress], None]


@dataclass(frozen=True)
class DownloadResult:
    """Where the model is, how many bytes came over the network for it, and whether it changed."""

    path: Path
    fetched_bytes: int
    is_new: bool


def download(
    root: Path,
    sources: Sequence[PartSource],
    hub: Hub,
    on_progress: ProgressCallback,
    *,
    check: bool = False,
    extra_space: float = 0.0,
) -> DownloadResult:
    """Make `root`/opensora-1.2 the model that `sources` name, fetching only what is not there.

    A model that is there is left alone when it is of these sources and each file has its size;
    check: when its checksums fit as well. Else it is replaced at once, when the new one is whole.
    spare: what else must fit on the disk, as a share of all files.
    Raises WeightsError for everything that the network, the server or the disk may do.
    """
    with disk_errors(root, _FIX), folder_lock(root, "download"):
        target = (root / PUBLISHED).resolve()
        present = installed_model(target)
        if present is not None:
            sources = [pin_revision(source, present) for source in sources]
            damaged = (
                present.wrong_checksum(target, partial(_tell, on_progress, "check"))
                if check
                else present.wrong_size(target)
            )
            if not damaged and all(matches_source(present, source) for source in sources):
                return DownloadResult(target, 0, False)
            refuse_unknown_files(target, {*present.files, FILE})
        files = [file for source in sources for file in hub.files(source)]
        staging = _prepare_staging(target.parent, files)
        checksums = _reuse_files(files, staging, target, on_progress)
        missing = _missing_bytes(staging, [f for f in files if f.path not in checksums])
        if missing:
            missing += int(extra_space * sum(file.size for file in files))
        require_disk_space(target.parent, missing, "fetched", _SPACE)
        fetched = 0
        for file in files:
            if file.path not in checksums:
                checksums[file.path], size = _fetch(hub, file, staging, on_progress)
                fetched += size
        _check_model(staging, hub)
        origins = {
            f.path: FileOrigin(f.repo, f.revision, f.name, f.size, checksums[f.path]) for f in files
        }
        Provenance(PUBLISHED, hub.address, origins).write(staging)
        replace_folder(staging, target)
        return DownloadResult(target, fetched, True)


def installed_model(target: Path) -> Provenance | None:
    """Provenance of the model that is there; None where nothing is."""
    if is_free(target):
        return None
    found = Provenance.read(target) if target.is_dir() else None
    if found is None or found.model != PUBLISHED:
        raise WeightsError(
            f"{target} exists, but was not downloaded by this command.",
            "Move it away, or check it with: python -m mlx_sora doctor.",
        )
    return found


def pin_revision(source: PartSource, present: Provenance) -> PartSource:
    """The commit that is there, where none is asked for: a repair does not update."""
    commits = {o.revision for o in _origins(present, source.part) if o.repo == source.repo}
    if source.revision is None and len(commits) == 1:
        return replace(source, revision=commits.pop())
    return source


def matches_source(present: Provenance, source: PartSource) -> bool:
    """Whether the part that is there is just what `source` names."""
    wanted = (source.repo, source.folder, source.revision)
    found = {(o.repo, o.folder, o.revision) for o in _origins(present, source.part)}
    return found == {wanted}


def _origins(present: Provenance, part: str) -> list[FileOrigin]:
    return [origin for path, origin in present.files.items() if path.startswith(f"{part}/")]


def _prepare_staging(root: Path, files: Sequence[RemoteFile]) -> Path:
    """The folder where files gather, with nothing in it that is not of this download."""
    staging = root / STAGING
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        staging.unlink()
    expected = {staging / f.path for f in files} | {_partial_path(staging, f) for f in files}
    folders = {path.parent for path in expected}
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path not in expected):
            path.unlink()
        elif path.is_dir() and path not in folders:
            shutil.rmtree(path)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return staging


def _partial_path(staging: Path, file: RemoteFile) -> Path:
    """Where the beginning of `file` lies; a file of other content begins elsewhere."""
    return staging / f"{file.path}.{file.checksum[:12]}.part"


def _reuse_files(
    files: Sequence[RemoteFile], staging: Path, target: Path, report: ProgressCallback
) -> dict[str, str]:
    """SHA-256 of each file that need not be fetched: from an earlier attempt or the old model."""
    checksums: dict[str, str] = {}
    for file in files:
        watch = partial(_watch, report, "check", file)
        place, old = staging / file.path, target / file.path
        found = file.matches(place, watch)
        if found is None:
            place.unlink(missing_ok=True)
            found = file.matches(old, watch)
            if found is not None and not _link(old, place):
                found = None
        if found is not None:
            checksums[file.path] = found
    return checksums


def _link(old: Path, place: Path) -> bool:
    """Give a file a second name, at no cost; some file systems cannot."""
    with suppress(OSError):
        os.link(old, place)
    return place.is_file()


def _missing_bytes(staging: Path, files: Sequence[RemoteFile]) -> int:
    """Bytes of `files` that are still to be fetched."""
    parts = [_partial_path(staging, file) for file in files]
    have = sum(part.stat().st_size for part in parts if part.is_file())
    return sum(file.size for file in files) - have


def _fetch(hub: Hub, file: RemoteFile, staging: Path, report: ProgressCallback) -> tuple[str, int]:
    """Fetch and verify one file: its SHA-256, and the bytes that came over the network."""
    part = _partial_path(staging, file)
    before = part.stat().st_size if part.is_file() else 0
    hub.fetch(file, part, partial(_watch, report, "fetch", file))
    found = file.matches(part, partial(_watch, report, "check", file))
    if found is None:
        part.unlink()
        raise WeightsError(
            f"{file.name} of {file.repo} arrived with another checksum than the server states.",
            "It is deleted; run the command again, or try another --endpoint.",
        )
    fsync(part)
    os.replace(part, staging / file.path)
    return found, file.size - min(before, file.size)


def _check_model(staging: Path, hub: Hub) -> None:
    """Raise WeightsError unless the files open as a model (headers only, no weights)."""
    try:
        absent = missing_parts(staging)
        if absent:
            raise WeightsError(f"{absent[0]} is missing.")
        for part in ("transformer", "vae", "text_encoder"):
            Checkpoint.open(staging / part)
            read_object(staging / part / "config.json")
    except (WeightsError, ValueError) as error:
        reason = error.message if isinstance(error, WeightsError) else f"no JSON: {error}"
        raise WeightsError(
            f"What {hub.address} serves is no model: {reason}",
            "Name other repositories with --source, or try another --endpoint.",
        ) from error


def _watch(report: ProgressCallback, action: str, file: RemoteFile, done: int) -> None:
    report(DownloadProgress(action, file.path, done, file.size))


def _tell(report: ProgressCallback, action: str, path: str, done: int, total: int) -> None:
    report(DownloadProgress(action, path, done, total))


#: What a conversion may take, as a share of the download: half if that is of 16 bits already.
_CONVERSION_SHARE = {8: 0.6, 4: 0.4}


@dataclass(frozen=True)
class QuantizedDownload:
    """downloaded: None where nothing had to be; removed: whether the original is gone."""

    download: DownloadResult | None
    conversion: ConversionResult
    original_removed: bool


def download_quantized(
    root: Path,
    sources: Sequence[PartSource],
    hub: Hub,
    on_progress: ProgressCallback,
    bits: int,
    *,
    check: bool = False,
    remove_original: bool = False,
) -> QuantizedDownload:
    """Make `root`/opensora-1.2-8bit (or -4bit) the quantised model of `sources`.

    If it is there, of these sources and whole (check: by checksums), nothing is asked of a server.
    remove_original: the download goes once the quantised model is whole. Raises WeightsError.
    """
    target, original = root / QUANTIZED_MODELS[bits], root / PUBLISHED
    present = installed_model(target)
    outcome: DownloadResult | None = None
    if present is not None and _is_conversion_of(present, sources, bits):
        damaged = (
            present.wrong_checksum(
                target, lambda *facts: on_progress(DownloadProgress("check", *facts))
            )
            if check
            else present.wrong_size(target)
        )
        if not damaged:
            size = sum(origin.bytes for origin in present.files.values())
            converted = ConversionResult(target, size, len(present.files), False)
            return QuantizedDownload(
                None, converted, remove_original and _remove_original(original)
            )
    outcome = download(
        root, sources, hub, on_progress, check=check, extra_space=_CONVERSION_SHARE[bits]
    )
    converted = convert(
        ModelFolder.open(outcome.path),
        target,
        ConversionOptions(bits),
        overwrite=present is not None,
        check=check,
        on_progress=lambda *facts: on_progress(DownloadProgress(*facts)),
    )
    return QuantizedDownload(outcome, converted, remove_original and _remove_original(original))


def _is_conversion_of(present: Provenance, sources: Sequence[PartSource], bits: int) -> bool:
    """Whether what is there was made of `sources` with so many bits."""
    same = present.conversion.get("quantization") == Quantization(bits).to_dict()
    return same and all(
        matches_source(present, pin_revision(source, present)) for source in sources
    )


def _remove_original(original: Path) -> bool:
    """Remove the download, if it is there. Raises WeightsError if its folder holds other files."""
    if not original.exists():
        return False
    folder = original.resolve()
    known = Provenance.read(folder)
    with disk_errors(folder, "Remove it by hand."):
        refuse_unknown_files(folder, {*known.files, FILE} if known else ())
        shutil.rmtree(folder)
    return True
