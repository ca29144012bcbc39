"""Getting the published model: all of it under its name, or nothing.

Files gather in a hidden folder beside the model's place, each under a `.part` name until its
checksum fits. When all are there and open as a model, that folder is renamed to the model's. So an
interrupted download is never taken for a model, and the next one continues it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.hub import Hub, RemoteFile
from mlx_sora.loading.model_folder import PUBLISHED, WEIGHTS_VARIABLE, missing_parts
from mlx_sora.loading.provenance import FILE, FileOrigin, Provenance
from mlx_sora.loading.sources import Source

#: Hidden, and never a name that `--model` knows.
STAGING = f".{PUBLISHED}.download"
REPLACED = f".{PUBLISHED}.replaced"

#: Bytes to leave free on the disk.
MARGIN = 64_000_000


@dataclass(frozen=True)
class Progress:
    """`done` of `total` bytes of the file `path` are checked (action "check") or here ("fetch")."""

    action: str
    path: str
    done: int
    total: int


#: Told what happens, file by file.
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """Where the model is, how many bytes came over the network for it, and whether it changed."""

    path: Path
    fetched: int
    changed: bool


def download(
    root: Path,
    sources: Sequence[Source],
    hub: Hub,
    report: Report,
    *,
    check: bool = False,
) -> Outcome:
    """Make `root`/opensora-1.2 the model that `sources` name, fetching only what is not there.

    A model that is there is left alone when it is of these sources and each file has its size;
    check: when its checksums fit as well. Else it is replaced at once, when the new one is whole.
    Raises WeightsError for everything that the network, the server or the disk may do.
    """
    with _filesystem(root), _only_one(root):
        target = (root / PUBLISHED).resolve()
        present = _present(target)
        if present is not None:
            sources = [_pin(source, present) for source in sources]
            damaged = (
                present.altered(target, partial(_tell, report, "check"))
                if check
                else present.missized(target)
            )
            if not damaged and all(_covers(present, source) for source in sources):
                return Outcome(target, 0, False)
            _refuse_strangers(target, present)
        files = [file for source in sources for file in hub.files(source)]
        staging = _staging(target.parent, files)
        checksums = _gather(files, staging, target, report)
        _check_space(target.parent, staging, [f for f in files if f.path not in checksums])
        fetched = 0
        for file in files:
            if file.path not in checksums:
                checksums[file.path], size = _fetch(hub, file, staging, report)
                fetched += size
        _check_model(staging, hub)
        origins = {
            f.path: FileOrigin(f.repo, f.revision, f.name, f.size, checksums[f.path]) for f in files
        }
        Provenance(PUBLISHED, hub.address, origins).write(staging)
        _publish(staging, target)
        return Outcome(target, fetched, True)


@contextmanager
def _filesystem(root: Path) -> Iterator[None]:
    """Say what the disk refused inside, in one line."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"Cannot use {error.filename or root}: {error.strerror or error}.",
            f"Check rights and space, or set {WEIGHTS_VARIABLE} to another folder.",
        ) from error


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold `root` against other downloads; the system lets go when the process ends."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"Another download into {root} is running."
            raise WeightsError(message, "Wait for it, or end it.") from error
        yield
    finally:
        os.close(handle)


def _present(target: Path) -> Provenance | None:
    """Provenance of the model that is there; None where nothing is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    found = Provenance.read(target) if target.is_dir() else None
    if found is None or found.model != PUBLISHED:
        raise WeightsError(
            f"{target} exists, but was not downloaded by this command.",
            "Move it away, or check it with: python -m mlx_sora doctor.",
        )
    return found


def _pin(source: Source, present: Provenance) -> Source:
    """The commit that is there, where none is asked for: a repair does not update."""
    commits = {o.revision for o in _origins(present, source.part) if o.repo == source.repo}
    if source.revision is None and len(commits) == 1:
        return replace(source, revision=commits.pop())
    return source


def _covers(present: Provenance, source: Source) -> bool:
    """Whether the part that is there is just what `source` names."""
    wanted = (source.repo, source.folder, source.revision)
    found = {(o.repo, o.folder, o.revision) for o in _origins(present, source.part)}
    return found == {wanted}


def _origins(present: Provenance, part: str) -> list[FileOrigin]:
    return [origin for path, origin in present.files.items() if path.startswith(f"{part}/")]


def _refuse_strangers(target: Path, present: Provenance) -> None:
    """A folder about to be replaced may hold nothing but what came with the model."""
    known = {*present.files, FILE}
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if not path.is_dir() and not path.name.startswith(".") and name not in known:
            raise WeightsError(
                f"{target} is to be replaced, but holds {name}, which is not of the download.",
                "Move that file elsewhere.",
            )


def _staging(root: Path, files: Sequence[RemoteFile]) -> Path:
    """The folder where files gather, with nothing in it that is not of this download."""
    staging = root / STAGING
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        staging.unlink()
    expected = {staging / f.path for f in files} | {_part(staging, f) for f in files}
    folders = {path.parent for path in expected}
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path not in expected):
            path.unlink()
        elif path.is_dir() and path not in folders:
            shutil.rmtree(path)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return staging


def _part(staging: Path, file: RemoteFile) -> Path:
    """Where the beginning of `file` lies; a file of other content begins elsewhere."""
    return staging / f"{file.path}.{file.checksum[:12]}.part"


def _gather(
    files: Sequence[RemoteFile], staging: Path, target: Path, report: Report
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


def _check_space(root: Path, staging: Path, files: Sequence[RemoteFile]) -> None:
    """Raise WeightsError before anything is fetched that would not fit."""
    parts = [(file, _part(staging, file)) for file in files]
    have = sum(part.stat().st_size for _, part in parts if part.is_file())
    needed = sum(file.size for file in files) - have
    free = shutil.disk_usage(root).free
    if files and needed + MARGIN > free:
        raise WeightsError(
            f"{needed / 1e9:.1f} GB are to be fetched, {root} has {free / 1e9:.1f} GB free.",
            f"Make room, or set {WEIGHTS_VARIABLE} to a folder on another disk.",
        )


def _fetch(hub: Hub, file: RemoteFile, staging: Path, report: Report) -> tuple[str, int]:
    """Fetch and verify one file: its SHA-256, and the bytes that came over the network."""
    part = _part(staging, file)
    before = part.stat().st_size if part.is_file() else 0
    hub.fetch(file, part, partial(_watch, report, "fetch", file))
    found = file.matches(part, partial(_watch, report, "check", file))
    if found is None:
        part.unlink()
        raise WeightsError(
            f"{file.name} of {file.repo} arrived with another checksum than the server states.",
            "It is deleted; run the command again, or try another --endpoint.",
        )
    with part.open("rb") as f:
        os.fsync(f.fileno())
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
            config = json.loads((staging / part / "config.json").read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise WeightsError(f"{part}/config.json holds no JSON object.")
    except (WeightsError, ValueError, RecursionError) as error:
        reason = error.message if isinstance(error, WeightsError) else f"no JSON: {error}"
        raise WeightsError(
            f"What {hub.address} serves is no model: {reason}",
            "Name other repositories with --source, or try another --endpoint.",
        ) from error


def _publish(staging: Path, target: Path) -> None:
    """Put the finished folder under the model's name; whatever was there goes."""
    old = target.parent / REPLACED
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def _watch(report: Report, action: str, file: RemoteFile, done: int) -> None:
    report(Progress(action, file.path, done, file.size))


def _tell(report: Report, action: str, path: str, done: int, total: int) -> None:
    report(Progress(action, path, done, total))
