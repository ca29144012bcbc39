"""The metadata of a run: request, settings and measurements, embedded in the output file.

mp4, mov, webm: comment tag; png: text chunk "mlx_sora"; gif: comment; webp: EXIF description;
sidecar: JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError, shell_words
from mlx_sora.request.generation import options
from mlx_sora.request.pixels import PIXELS_PREFIX
from mlx_sora.runtime.switches import switches
from mlx_sora.utils.files import check_file
from mlx_sora.utils.json import parse_object
from mlx_sora.utils.versions import versions
from mlx_sora.video.containers import (
    MAX_PACKETS,
    is_picture,
    open_container,
    open_image,
    read_errors,
)

if TYPE_CHECKING:
    from mlx_sora.request.generation import GenerationRequest

PNG_KEY = "mlx_sora"
EXIF_DESCRIPTION = 0x010E

#: Picture formats that can hold a record.
IMAGE_FORMATS = ("PNG", "GIF", "WEBP")

#: Largest size of a record, and largest rate in one that is believed.
MAX_BYTES, MAX_FPS = 1 << 20, 1000


def build_metadata(
    request: GenerationRequest,
    settings: Mapping[str, Any],
    *,
    warnings: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    peak_memory: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the record of a run.

    settings: resolved options. seconds, peak_memory: per stage; bytes.
    """
    record: dict[str, Any] = {
        "request": request.to_dict(),
        "settings": dict(settings),
        "warnings": list(warnings),
        "versions": versions(),
        "mlx_switches": switches(),
    }
    if seconds:
        record["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    if peak_memory:
        record["peak_memory"] = dict(peak_memory)
    return record


def without_folders(value: Any, paths: Iterable[str]) -> Any:
    """Return JSON values in which each of `paths` is its last name, wherever it stands in a text.

    A record travels with its video. Folders name their user.
    """
    known = sorted({path for path in paths if "/" in path.rstrip("/")}, key=len, reverse=True)

    def strip(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: strip(each) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [strip(each) for each in item]
        if isinstance(item, str):
            for path in known:
                item = item.replace(path, path.rstrip("/").rpartition("/")[2])
        return item

    return strip(value)


def to_json(record: Mapping[str, Any], *, ascii_only: bool = False) -> str:
    """Serialize a record as one line of JSON."""
    return json.dumps(record, ensure_ascii=ascii_only, separators=(",", ":"))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the record of an mp4, mov, webm, png, gif, webp or JSON file. Raises UsageError."""
    path = Path(os.path.expanduser(path))
    check_file(path, "Give a video or JSON file of mlx_sora.")
    with read_errors(path, "Is it damaged?"):
        text = _choose_reader(path)(path)
    return _parse(text, path)


def replay_options(record: Mapping[str, Any], source: str | Path = "the record") -> dict[str, Any]:
    """Return the options of `GenerationRequest` that repeat the recorded run.

    Settings override the request, so that later defaults of a model change nothing. Options of the
    output are left out. Raises UsageError for a record that is not of mlx_sora.
    """
    request = record.get("request")
    settings = record.get("settings", {})
    if "reconstruction" in record:
        raise UsageError(
            f"{source} is a reconstruction, which has no prompt.",
            "Repeat it with its source: python -m mlx_sora reconstruct VIDEO",
        )
    if not isinstance(request, dict) or not isinstance(settings, dict):
        raise UsageError(f"{source} has no request of mlx_sora.", "Give a file that it wrote.")
    if "edit" in record:
        edit = record["edit"] if isinstance(record["edit"], dict) else {}
        words = [edit.get("video", "VIDEO"), "--source-prompt", edit.get("source_prompt", "TEXT")]
        words += ["--prompt", request.get("prompt")]
        raise UsageError(
            f"{source} is an edited video, which a prompt alone cannot repeat.",
            f"Edit its source again: python -m mlx_sora edit {shell_words(*words)}",
        )
    known = options()
    unknown = [str(name)[:40] for name in request if name not in known]
    if unknown:
        raise UsageError(
            f"{source} asks for {unknown[0]!r}, which this version does not know.",
            "Update mlx_sora.",
        )
    found = {name: value for name, value in request.items() if known[name].replay}
    if "width" in settings:
        for name in ("resolution", "aspect_ratio"):
            found.pop(name, None)
    for name, value in settings.items():
        if name in known and known[name].replay and not (name == "model" and name in found):
            found[name] = value
    return found


def find_media(record: Mapping[str, Any], name: str, source: Path, option: str = "--prompt") -> str:
    """Return the path of a recorded image or video: beside the file `source`, or as it is named.

    option: the flag with which it was given, for the message.

    Raises UsageError if there is none, or if its content is not that of the recorded run: a record
    from somebody else could name any file of the user, which a replay would show.
    """
    from mlx_sora.utils.files import sha256

    settings = record.get("settings")
    media = settings.get("media") if isinstance(settings, dict) else None
    items = [item for item in media if isinstance(item, dict)] if isinstance(media, list) else []
    sums = {item.get("sha256") for item in items if item.get("path") == name}
    again = f"Give {option} again."
    if name.startswith(PIXELS_PREFIX):
        raise UsageError(f"{source} was made with pixels in memory, which no file has.", again)
    present = [path for path in (source.parent / Path(name).name, Path(name)) if path.is_file()]
    if not present:
        raise UsageError(f"{name}, which {source} was made with, is not beside it.", again)
    for path in present:
        if sha256(path) in sums:
            return str(path)
    raise UsageError(f"{present[0]} is not the file that {source} was made with.", again)


def recorded_timing(image: Any) -> tuple[float, int] | None:
    """Return rate and number of frames in the record of an open image, None without a record."""
    try:
        settings = parse_object((_image_text(image) or "")[:MAX_BYTES]).get("settings")
        fps, frames = float(settings["fps"]), int(settings["num_frames"])  # type: ignore[index]
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
    return (fps, frames) if 0 < fps <= MAX_FPS and 0 < frames <= MAX_PACKETS else None


def _parse(text: str | None, path: Path) -> dict[str, Any]:
    if not text:
        raise UsageError(f"{path} has no metadata of mlx_sora.", "Give a file that it wrote.")
    try:
        if len(text) > MAX_BYTES:
            raise ValueError("it is too long")
        return parse_object(text)
    except ValueError:
        raise UsageError(f"The metadata of {path} is not a record of mlx_sora.") from None


def _choose_reader(path: Path) -> Callable[[Path], str | None]:
    """Choose by content; the name decides only about text that may be damaged JSON."""
    if is_picture(path):
        return _read_image
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _read_json if head.startswith(b"{") or path.suffix.lower() == ".json" else _read_film


def _read_json(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1).decode("utf-8-sig")


def _read_film(path: Path) -> str | None:
    with open_container(path) as container:
        tags = {str(name).lower(): value for name, value in container.metadata.items()}
        comment = tags.get("comment")  # in capitals in Matroska
        return None if comment is None else str(comment)


def _read_image(path: Path) -> str | None:
    with open_image(path, IMAGE_FORMATS) as image:
        return _image_text(image)


def _image_text(image: Any) -> str | None:
    if image.format == "PNG":
        found: Any = image.info.get(PNG_KEY)
    elif image.format == "GIF":
        found = image.info.get("comment")
    else:
        found = image.getexif().get(EXIF_DESCRIPTION)
    if isinstance(found, bytes):
        return found.decode("utf-8")
    return found if found is None else str(found)
