"""Output paths: formats, and checks that they can be written.

All checks run before any work, so that a run does not end with "cannot write".
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mlx_sora.errors import UsageError, shell_words
from mlx_sora.request.options import as_path
from mlx_sora.utils.files import partial_name, recover, remove_partial
from mlx_sora.utils.obstacles import (
    check_folder,
    existing_folder,
    is_special,
    refuse_obstacle,
)
from mlx_sora.video.encoders import FILMS, missing_encoder
from mlx_sora.video.output_template import fill_template

SUFFIXES = (".mp4", ".mov", ".webm", ".gif", ".webp", ".png")

#: Suffix of checkpoints.
CHECKPOINT_SUFFIX = ".checkpoint.safetensors"

#: GIF stores delays in 1/100 s, and players slow down anything below 2/100 s.
MAX_GIF_FPS = 50.0

#: Names of the standard streams, which are no files.
_STREAMS = re.compile(r"-|/dev/(std(in|out|err)|fd/\d+)|/proc/self/fd/\d+")

_COUNTER = re.compile(r"%0?(\d{0,2})d")


def output_path(
    template: str,
    *,
    prompt: str,
    seed: int,
    num_frames: int,
    index: int = 0,
    model: str = "",
) -> Path:
    """Return the output file of a request: `complete_path` of the filled-in template."""
    name = fill_template(template, prompt=prompt, seed=seed, index=index, model=model)
    return complete_path(name, num_frames)


def complete_path(name: str, num_frames: int) -> Path:
    """Return `name` as a path, with a suffix if it has none: .png for one frame, else .mp4.

    "FOLDER/" becomes FOLDER/frame_%05d.png, a pattern with one png per frame. Raises UsageError for
    standard output.
    """
    if _STREAMS.fullmatch(name):
        raise UsageError(
            f"The video cannot go to {name}: it is written to a file.", "Name a file in --output."
        )
    path = expand_path(name)
    if name.endswith(("/", "\\")):
        return path / "frame_%05d.png"
    if not path.name:
        raise UsageError(f"{name} is a folder.", "Name a file in --output.")
    if not path.suffix and not os.path.isdir(path) and not is_special(path):
        return path.with_name(path.name + (".png" if num_frames == 1 else ".mp4"))
    return path


def expand_path(name: str) -> Path:
    """Return a path with ~ expanded. Raises UsageError for an invalid path."""
    try:
        return Path(as_path(name)).expanduser()
    except (ValueError, RuntimeError) as error:
        reason = f"must be {error}" if isinstance(error, ValueError) else "names no user's home"
        raise UsageError(f"The output {name!r} {reason}.", "Change --output.") from None


def is_sequence(path: Path) -> bool:
    """Return True if `path` is a pattern such as name_%04d.png."""
    return _COUNTER.search(path.name) is not None


def sequence_stem(path: Path) -> str:
    """Return the name of a sequence without its counter: "frame" for frame_%05d.png."""
    return _COUNTER.sub("", path.stem).strip("_-. ") or "frames"


def frame_path(path: Path, index: int) -> Path:
    """Return the file of frame `index` of a sequence."""

    def number(match: re.Match[str]) -> str:
        return str(index).zfill(int(match[1] or 0))

    return path.with_name(_COUNTER.sub(number, path.name, count=1))


def checkpoint_path(output: Path) -> Path:
    """Return the path of a run's checkpoint: beside its output, named after it."""
    return output.with_name(output.name + CHECKPOINT_SUFFIX)


def existing_files(path: Path) -> list[Path]:
    """Return the files that writing to `path` would replace.

    An incomplete sequence of a killed run does not count. Its first image is missing, because
    that is renamed last, and the run's checkpoint exists.
    """
    if not is_sequence(path):
        return [path] if os.path.lexists(path) else []
    found = frame_files(path)
    incomplete = frame_path(path, 0) not in found and os.path.isfile(checkpoint_path(path))
    return [] if incomplete else found


def frame_files(path: Path) -> list[Path]:
    """Return everything in the folder that has the name of a frame of the sequence, in order."""
    before, after = _COUNTER.split(path.name, maxsplit=1)[::2]
    pattern = re.compile(f"{re.escape(_fold(before))}([0-9]+){re.escape(_fold(after))}")
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(path.parent):
            if name[-4:].lower() != path.suffix.lower():
                continue
            match = pattern.fullmatch(_fold(name))
            frame = frame_path(path, int(match[1])) if match and len(match[1]) < 10 else None
            # Names that differ in case only are one file on many disks of Macs.
            if frame is None or _fold(frame.name) != _fold(name):
                continue
            if frame.name == name or is_same_file(frame, path.with_name(name)):
                found.append(frame)
    return sorted(found)


def is_same_file(path: Path, other: Path) -> bool:
    """Return True if both names lead to one file, or to one link."""
    with suppress(OSError):
        return os.path.samestat(os.lstat(path), os.lstat(other))
    return False


def _fold(name: str) -> str:
    """Return a name without differences that case-insensitive file systems ignore."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


class OutputNames:
    """Names of the files that the videos of a batch go to."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, Path]] = {}

    def add(self, path: Path, *, sidecar: bool) -> None:
        """Add an output. Raises UsageError if an earlier one would go to the same file."""
        names = [_COUNTER.sub("%d", path.name, count=1)]
        names += [sidecar_path(path).name] if sidecar else []
        for name in (str(path.with_name(name)) for name in names):
            alike = self._names.setdefault(_fold(name), {})
            other = alike.get(name) or next(iter(alike.values()), None)
            if other is not None and (name in alike or _ignores_case(path.parent)):
                raise UsageError(
                    f"Two videos would be written to one file, {path}"
                    + (f" and {other}." if path != other else "."),
                    "Put {seed} or {index} into the output.",
                )
            alike[name] = path


def _ignores_case(folder: Path) -> bool:
    """Return True if the file system takes a name in upper case for the same file."""
    probe = partial_name(existing_folder(folder) / "case")
    try:
        probe.touch()
        return os.path.exists(probe.with_name(probe.name.swapcase()))
    except OSError:
        return False
    finally:
        remove_partial(probe)


def sidecar_path(path: Path) -> Path:
    """Return the JSON file beside `path`: clip.mp4 -> clip.json, clip_%04d.png -> clip.json."""
    stem = _COUNTER.sub("", path.stem, count=1).rstrip("-_. ")
    return path.with_name((stem or "metadata") + ".json")


def check_output(
    path: str | Path,
    overwrite: bool = False,
    *,
    sidecar: bool = False,
    others: Sequence[Path] = (),
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> None:
    """Raise UsageError unless `path` can be written now. Leaves no file.

    A link to a file counts as the file; with `overwrite` the link is replaced, not followed.
    others: files that the run replaces beside it. size: (width, height) in pixels. Values that are
    None are not checked.
    """
    path = Path(path)
    beside = [*others, sidecar_path(path)] if sidecar else others
    _check_names(path, beside, num_frames)
    _check_kind(path)
    check_folder(path.parent)
    check_obstacles(path)
    for file in beside:
        refuse_obstacle(file)
    existing = existing_files(path)
    if sidecar and sidecar_path(path).exists():
        existing.append(sidecar_path(path))
    if existing and not overwrite:
        check_first_frame(path, existing)
        raise UsageError(f"{existing[0]} exists already.", "Give --overwrite or another --output.")
    check_format(path, num_frames=num_frames, size=size, fps=fps)


def check_obstacles(path: Path) -> None:
    """Raise UsageError for a folder, pipe, device or broken link under the name of an output.

    Under the name of a frame, links of any kind are refused. Before that, undoes what a killed run
    has left of a sequence.
    """
    if not is_sequence(path):
        refuse_obstacle(path)
        return
    recover(path.parent)
    for frame in frame_files(path):
        refuse_obstacle(frame)
        if frame.is_symlink():
            raise UsageError(f"{frame} is a link.", "Remove it, or change --output.")


def check_first_frame(path: Path, existing: Sequence[Path]) -> None:
    """Raise UsageError for frames of a sequence without the first, which comes last."""
    first = frame_path(path, 0)
    if is_sequence(path) and first not in existing and existing[0] != sidecar_path(path):
        raise UsageError(
            f"{existing[0]} is part of an unfinished sequence: its first frame is missing.",
            "Give --overwrite or another --output.",
        )


def check_inputs(path: Path, inputs: Iterable[str | Path], sidecar: bool = False) -> None:
    """Raise UsageError if writing to `path` would replace a file that the run reads."""
    written = [*existing_files(path), *([sidecar_path(path)] if sidecar else [])]
    stats: dict[tuple[int, int], Path] = {}
    for file in written:
        with suppress(OSError):
            stats[_identity(os.lstat(file))] = file
    for name in inputs:
        with suppress(OSError):
            if (found := stats.get(_identity(os.stat(name)))) is not None:
                raise UsageError(
                    f"{found} is also an input, which the output would replace.",
                    "Give another --output.",
                )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def check_format(
    path: Path,
    *,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> None:
    """Raise UsageError for frames that the format of `path` cannot hold."""
    suffix = path.suffix.lower()
    if missing := missing_encoder(suffix):
        works = [other for other in SUFFIXES if other != suffix and not missing_encoder(other)]
        raise UsageError(
            missing[0], f"Write {', '.join(works)} (one frame, or FOLDER/), {missing[1]}"
        )
    if suffix in FILMS and size and (size[0] % 2 or size[1] % 2):
        raise UsageError(
            f"{suffix[1:]} needs even sides, not {size[0]}x{size[1]}.",
            "Choose another size or .webp.",
        )
    if suffix == ".gif" and fps and fps > MAX_GIF_FPS:
        raise UsageError(
            f"GIF plays at most {MAX_GIF_FPS:g} frames per second, not {fps:g}.",
            "Lower --fps or write .mp4.",
        )
    if suffix == ".png" and num_frames and num_frames > 1 and not is_sequence(path):
        raise UsageError(
            f"{path.name} can hold one frame, not {num_frames}.",
            f"Write {shell_words(f'{path.stem}_%04d.png')}, FOLDER/ (one file per frame) or .mp4.",
        )


def _check_names(path: Path, others: Iterable[Path], num_frames: int | None) -> None:
    """Raise UsageError if the name of any file that the run writes is too long."""
    frame = frame_path(path, max(0, (num_frames or 1) - 1))
    for file in (frame, path, *others, partial_name(path)):
        try:
            os.lstat(file)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UsageError(
                    f"The name {file.name} is too long for the file system.",
                    "Give a shorter --output.",
                ) from None


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder.",
            f"Name a file in it, or write {shell_words(f'{path}/')} for one png per frame.",
        )
    refuse_obstacle(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"Unknown output format {path.name!r}.", f"Use {', '.join(SUFFIXES)}.")
    if is_sequence(path) and path.suffix.lower() != ".png":
        raise UsageError(f"{path.name}: only png is written frame by frame.", "Use .png.")
