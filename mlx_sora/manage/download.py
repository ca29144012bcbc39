"""Download of the published model, and of its quantized conversions.

Files arrive in a hidden folder beside the destination, each under a `.part` name until its checksum
is right. When all are there and open as a model, the folder is renamed. So a partial download is
never taken for a model, and the next attempt continues it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_sora.errors import WeightsError, shell_words
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import (
    PARTS,
    PUBLISHED,
    QUANTIZED_MODELS,
    WEIGHTS_VARIABLE,
    ModelFolder,
    missing_parts,
    model_path,
)
from mlx_sora.manage.conversion_plan import ConversionOptions, companion_files
from mlx_sora.manage.convert import ConversionResult, convert
from mlx_sora.manage.hub import Hub, RemoteFile, cached_copies
from mlx_sora.manage.progress import ProgressCallback, byte_counter
from mlx_sora.manage.provenance import FileOrigin, Provenance
from mlx_sora.manage.sources import PartSource
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
from mlx_sora.pipeline.locks import removal_lock
from mlx_sora.utils.files import rename_into_place
from mlx_sora.utils.json import read_object

#: Hidden folder of an unfinished download.
STAGING = f".{PUBLISHED}.download"

#: Largest size of a conversion, as a share of the download: half if that is 16-bit already.
_CONVERSION_SHARE = {8: 0.6, 4: 0.4}

_DISK_FIX = f"Check rights and space, or set {WEIGHTS_VARIABLE} to another folder."
_SPACE_FIX = f"Make room, or set {WEIGHTS_VARIABLE} to a folder on another disk."


@dataclass(frozen=True)
class DownloadResult:
    """A downloaded model.

    is_new: False if it was already there. linked_bytes: those taken from the hub's cache.
    """

    path: Path
    fetched_bytes: int
    is_new: bool
    linked_bytes: int = 0


@dataclass(frozen=True)
class QuantizedDownload:
    """A quantized model. download: None if nothing had to be downloaded."""

    download: DownloadResult | None
    conversion: ConversionResult
    original_removed: bool


def download(
    root: Path,
    sources: Sequence[PartSource],
    hub: Hub,
    on_progress: ProgressCallback,
    *,
    check: bool = False,
    extra_space: float = 0.0,
) -> DownloadResult:
    """Download `sources` to `root`/opensora-1.2. Fetches only what is missing.

    What `hf download` put into the hub's cache is linked, not copied.

    A model of the same sources is left alone if its file sizes (check: and checksums) are right,
    else replaced when the new one is complete. extra_space: disk space to require in addition, as a
    share of all files. Raises WeightsError for faults of network, server and disk.
    """
    with disk_errors(root, _DISK_FIX), folder_lock(root, "download"):
        target = (root / PUBLISHED).resolve()
        restore_folder(target)
        present = installed_model(target)
        if present is not None:
            sources = [pin_revision(source, present) for source in sources]
            damaged = present.damaged_files(target, check, on_progress)
            if not damaged and all(matches_source(present, source) for source in sources):
                if check:
                    Statistics.measure(target, on_progress).write(target)
                return DownloadResult(target, 0, False)
            refuse_unknown_files(target, {*present.files, *RECORDS})
        files = [file for source in sources for file in hub.files(source)]
        staging = _prepare_staging(target.parent, files)
        checksums, linked = _reuse_files(files, staging, target, on_progress)
        missing = _missing_bytes(staging, [f for f in files if f.path not in checksums])
        if missing:
            missing += int(extra_space * sum(file.size for file in files))
        require_disk_space(target.parent, missing, "fetched", _SPACE_FIX)
        fetched = 0
        for file in files:
            if file.path not in checksums:
                checksums[file.path], size = _fetch(hub, file, staging, on_progress)
                fetched += size
        _check_model(staging, hub)
        origins = {
            f.path: FileOrigin(f.repo, f.revision, f.name, f.size, checksums[f.path]) for f in files
        }
        Statistics.measure(staging, on_progress).write(staging)
        Provenance(PUBLISHED, hub.address, origins).write(staging)
        replace_folder(staging, target)
        return DownloadResult(target, fetched, True, linked)


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
    """Download `sources` and convert them to `root`/opensora-1.2-8bit (or -4bit).

    A model downloaded earlier is converted where it lies.

    If that model is there, of the same sources and undamaged (check: by checksums), no server is
    contacted. remove_original: delete the download when the conversion is complete.
    Raises WeightsError.
    """
    target, original = root / QUANTIZED_MODELS[bits], model_path(PUBLISHED)
    present = installed_model(target)
    downloaded: DownloadResult | None = None
    if (
        present is not None
        and _is_conversion_of(present, sources, bits)
        and not present.damaged_files(target, check, on_progress)
    ):
        conversion = ConversionResult(target, present.nbytes, len(present.files), False)
    else:
        space = _CONVERSION_SHARE[bits]
        downloaded = download(
            original.parent, sources, hub, on_progress, check=check, extra_space=space
        )
        conversion = convert(
            ModelFolder.open(downloaded.path),
            target,
            ConversionOptions(bits),
            overwrite=present is not None,
            check=check,
            on_progress=on_progress,
        )
    removed = remove_original and _remove_original(original, target)
    return QuantizedDownload(downloaded, conversion, removed)


def installed_model(target: Path) -> Provenance | None:
    """Return the provenance of the model in `target`, None if there is nothing.

    Raises WeightsError for a folder that was not downloaded.
    """
    if is_free(target):
        return None
    found = Provenance.read(target) if target.is_dir() else None
    if found is None or found.model != PUBLISHED:
        raise WeightsError(
            f"{target} exists, but was not downloaded by this command.",
            f"Move it away, or check it with: python -m mlx_sora doctor {shell_words(target)}",
        )
    return found


def pin_revision(source: PartSource, present: Provenance) -> PartSource:
    """Set the installed commit if `source` names no revision: a repair does not update."""
    commits = {o.revision for o in present.part_origins(source.part) if o.repo == source.repo}
    if source.revision is None and len(commits) == 1:
        return replace(source, revision=commits.pop())
    return source


def matches_source(present: Provenance, source: PartSource) -> bool:
    """Return True if the installed part comes from `source` alone."""
    found = {(o.repo, o.folder, o.revision) for o in present.part_origins(source.part)}
    return found == {(source.repo, source.folder, source.revision)}


def _prepare_staging(root: Path, files: Sequence[RemoteFile]) -> Path:
    """Create the folder of the unfinished download; remove what does not belong to `files`."""
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
    # With the checksum in its name, a partial file is never continued with other content.
    return staging / f"{file.path}.{file.checksum[:12]}.part"


def _reuse_files(
    files: Sequence[RemoteFile], staging: Path, target: Path, on_progress: ProgressCallback
) -> tuple[dict[str, str], int]:
    """Place the files of an earlier attempt, of the old model and of the hub's cache.

    Return their SHA-256, and the bytes of the last kind.
    """
    checksums: dict[str, str] = {}
    linked = 0
    for file in files:
        counter = byte_counter(on_progress, "check", file.path, file.size)
        place = staging / file.path
        found = file.matches(place, counter)
        if found is not None:
            checksums[file.path] = found
            continue
        place.unlink(missing_ok=True)
        for copy in (target / file.path, *cached_copies(file)):
            found = file.matches(copy, counter)
            if found is not None and _link(copy, place, symbolic=copy.parent.parent != target):
                checksums[file.path] = found
                linked += 0 if copy == target / file.path else file.size
                break
    return checksums, linked


def _link(file: Path, place: Path, *, symbolic: bool) -> bool:
    """Give `file` the second name `place`; return False if the disks cannot."""
    for link in (os.link, os.symlink) if symbolic else (os.link,):
        with suppress(OSError):  # another disk, or a file system without links
            link(file, place)
            return True
    return False


def _missing_bytes(staging: Path, files: Sequence[RemoteFile]) -> int:
    partials = [_partial_path(staging, file) for file in files]
    present = sum(partial.stat().st_size for partial in partials if partial.is_file())
    return sum(file.size for file in files) - present


def _fetch(
    hub: Hub, file: RemoteFile, staging: Path, on_progress: ProgressCallback
) -> tuple[str, int]:
    """Fetch and verify a file; return its SHA-256 and the bytes transferred."""
    partial = _partial_path(staging, file)
    before = partial.stat().st_size if partial.is_file() else 0
    hub.fetch(file, partial, byte_counter(on_progress, "fetch", file.path, file.size))
    found = file.matches(partial, byte_counter(on_progress, "check", file.path, file.size))
    if found is None:
        partial.unlink()
        raise WeightsError(
            f"{file.name} of {file.repo} does not have the checksum that the server states.",
            "It is deleted; run the command again, or try another --endpoint.",
        )
    rename_into_place(partial, staging / file.path, overwrite=True)
    return found, file.size - min(before, file.size)


def _check_model(staging: Path, hub: Hub) -> None:
    """Raise WeightsError unless the files open as a model. Reads headers only."""
    try:
        missing = missing_parts(staging)
        if missing:
            raise WeightsError(f"{missing[0]} is missing.")
        for part in PARTS:
            Checkpoint.open(staging / part)
            read_object(staging / part / "config.json")
    except (WeightsError, ValueError) as error:
        reason = error.message if isinstance(error, WeightsError) else f"invalid JSON: {error}"
        raise WeightsError(
            f"The files from {hub.address} are not a model: {reason}",
            "Name other repositories with --source, or try another --endpoint.",
        ) from error


def _is_conversion_of(present: Provenance, sources: Sequence[PartSource], bits: int) -> bool:
    settings = present.conversion.get("quantization")  # a conversion of old has no rotation
    same = isinstance(settings, dict) and settings.get("bits") == bits
    return same and all(
        matches_source(present, pin_revision(source, present)) for source in sources
    )


def _remove_original(original: Path, conversion: Path) -> bool:
    """Remove the download if there is one.

    Raises WeightsError if its folder is in use, or holds other files, which are not in its
    conversion, either.
    """
    if not original.exists():
        return False
    folder = original.resolve()
    provenance = Provenance.read(folder)
    with disk_errors(folder, "Remove it by hand."), removal_lock(folder):
        known = {
            name
            for name, content in companion_files(folder)
            if (conversion / name).is_file() and (conversion / name).read_bytes() == content
        }
        known |= {*provenance.files, *RECORDS} if provenance else set()
        refuse_unknown_files(folder, known)
        shutil.rmtree(folder)
    return True
