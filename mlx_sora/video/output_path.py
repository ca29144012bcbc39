"""Output paths: templates, formats, and checks that they can be written.

All checks run before any work, so that a run does not end with "cannot write".
"""

from __future__ import annotations

import re
import string
from pathlib import Path

from mlx_sora.errors import UsageError, shell_words
from mlx_sora.request.options import as_path

SUFFIXES = (".mp4", ".gif", ".webp", ".png")
TEMPLATE_NAMES = ("seed", "index", "prompt_slug")

#: Default of the command line; the suffix depends on the number of frames.
DEFAULT_OUTPUT = "{prompt_slug}-{seed}"

#: Suffix of checkpoints.
CHECKPOINT_SUFFIX = ".checkpoint.safetensors"

#: GIF stores delays in 1/100 s, and players slow down anything below 2/100 s.
MAX_GIF_FPS = 50.0

_COUNTER = re.compile(r"%0?(\d{0,2})d")

#: Format of a template's field, such as {index:03d}; larger widths would make long names.
_SPEC = re.compile(r"\d{0,2}d?")


def slug(prompt: str, limit: int = 48) -> str:
    """Return a prompt's words for a file name: joined by hyphens, at most `limit` characters."""
    words = re.findall(r"\w+", prompt.lower())
    return "-".join(words)[:limit].strip("-_") or "video"


def fill_template(template: str, *, prompt: str, seed: int, index: int = 0) -> str:
    """Fill {seed}, {index} and {prompt_slug} into `template` ({index:03d} works too).

    Raises UsageError for any other name.
    """
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                continue
            if name not in TEMPLATE_NAMES or conversion or not _SPEC.fullmatch(spec or ""):
                raise ValueError
        return template.format(seed=seed, index=index, prompt_slug=slug(prompt))
    except (ValueError, LookupError, AttributeError):
        known = ", ".join(f"{{{name}}}" for name in TEMPLATE_NAMES)
        raise UsageError(
            f"Cannot fill in the output {template!r}.",
            f"Use {known}; write {{{{ and }}}} for braces.",
        ) from None


def escape_template(name: str) -> str:
    """Return the template that `fill_template` turns into `name`."""
    return name.replace("{", "{{").replace("}", "}}")


def output_path(template: str, *, prompt: str, seed: int, num_frames: int, index: int = 0) -> Path:
    """Return the output file of a request: `complete_path` of the filled-in template."""
    name = fill_template(template, prompt=prompt, seed=seed, index=index)
    return complete_path(name, num_frames)


def complete_path(name: str, num_frames: int) -> Path:
    """Return `name` as a path, with a suffix if it has none: .png for one frame, else .mp4.

    "FOLDER/" becomes FOLDER/frame_%05d.png, a pattern with one png per frame.
    """
    path = expand_path(name)
    if name.endswith(("/", "\\")):
        return path / "frame_%05d.png"
    if not path.suffix and not path.is_dir():
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
        return [path] if path.is_file() else []
    if not path.parent.is_dir():
        return []
    before, after = _COUNTER.split(path.name, maxsplit=1)[::2]
    pattern = re.compile(re.escape(before) + r"\d+" + re.escape(after))
    found = sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))
    incomplete = frame_path(path, 0) not in found and checkpoint_path(path).is_file()
    return [] if incomplete else found


def sidecar_path(path: Path) -> Path:
    """Return the JSON file beside `path`: clip.mp4 -> clip.json, clip_%04d.png -> clip.json."""
    stem = _COUNTER.sub("", path.stem, count=1).rstrip("-_. ")
    return path.with_name((stem or "metadata") + ".json")


def check_output(
    path: str | Path,
    overwrite: bool = False,
    *,
    sidecar: bool = False,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> None:
    """Raise UsageError unless `path` can be written now. Leaves no file.

    size: (width, height) in pixels. Values that are None are not checked.
    """
    path = Path(path)
    _check_kind(path)
    _check_folder(path)
    existing = existing_files(path)
    if sidecar and sidecar_path(path).exists():
        existing.append(sidecar_path(path))
    if existing and not overwrite:
        raise UsageError(f"{existing[0]} exists already.", "Give --overwrite or another --output.")
    check_format(path, num_frames=num_frames, size=size, fps=fps)


def check_format(
    path: Path,
    *,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> None:
    """Raise UsageError for frames that the format of `path` cannot hold."""
    suffix = path.suffix.lower()
    if suffix == ".mp4" and size and (size[0] % 2 or size[1] % 2):
        raise UsageError(
            f"mp4 needs even sides, not {size[0]}x{size[1]}.", "Choose another size or .webp."
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


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder.",
            f"Name a file in it, or write {shell_words(f'{path}/')} for one png per frame.",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"Unknown output format {path.name!r}.", f"Use {', '.join(SUFFIXES)}.")
    if is_sequence(path) and path.suffix.lower() != ".png":
        raise UsageError(f"{path.name}: only png is written frame by frame.", "Use .png.")


def _check_folder(path: Path) -> None:
    import tempfile

    folder = path.parent
    if is_sequence(path) and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"The folder {folder} does not exist.", "Create it, or change --output.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"Cannot write into {folder}: {error.strerror}.", "Change --output."
        ) from None
