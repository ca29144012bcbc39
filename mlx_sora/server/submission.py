"""Tasks from the bodies of requests: the fields of the video API, and every option of a request.

Values are read by the readers of the options, so that text of a form and JSON mean the same. No
path of a client is opened: pictures and videos are uploads, or identifiers of uploads and videos.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import FRAME_ALIASES, MICRO_FRAME_SIZE, RESOLUTIONS
from mlx_sora.request.generation import options
from mlx_sora.request.options import as_float, as_int, as_text
from mlx_sora.server.checks import FORMATS
from mlx_sora.server.http_errors import HttpError
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.schema import edit_types, option_types, public_options
from mlx_sora.server.store import DONE
from mlx_sora.server.task import EDIT, GENERATE, Task

#: Frame rate of all published models, at which Open-Sora names its lengths.
_FPS = 24

#: Options that a video made from another takes over from it.
_SIZE = ("width", "height", "resolution", "aspect_ratio")

_ID = re.compile(r"(file-|video_)[0-9a-z]{1,64}", re.ASCII)
_SIZE_TEXT = re.compile(r"([0-9]{1,5})\s*[x×*]\s*([0-9]{1,5})", re.ASCII)
_DATA_URL = re.compile(r"data:[a-z0-9.+/-]*(;[a-z0-9=.-]+)*;base64,", re.ASCII | re.IGNORECASE)

#: What a task can be made from.
Fields = Mapping[str, Any]


def read_task(queue: JobQueue, fields: Fields) -> Task:
    """Return the task of POST /v1/videos: a video, or with `kind: edit` an edit of `video`."""
    fields = dict(fields)
    kind = fields.pop("kind", None) or GENERATE
    if kind == EDIT:
        return read_edit(queue, fields)[0]
    if kind != GENERATE:
        raise _invalid("kind", f"There is no kind {str(kind)[:40]!r}.", "Valid: generate, edit.")
    picture = fields.pop("input_reference", None)
    values = read_options(GENERATE, fields)
    if picture is not None:
        id = _reference(queue, picture, "input_reference")
        values["images"] = [[id, 0, 1.0], *values.get("images", [])]
    _require_prompt(values)
    return Task(GENERATE, values)


def read_edit(
    queue: JobQueue, fields: Fields, source: str | None = None
) -> tuple[Task, str | None]:
    """Return an edit of `video`, and the identifier of the video that it comes from.

    source: identifier that stands for `video`. The prompt recorded in the video describes it,
    unless there is a `source_prompt`; model and size are taken over from a video of the queue.
    """
    fields = dict(fields)
    video = source or _reference(queue, fields.pop("video", None), "video")
    recorded, parent = _recorded(queue, video)
    values = read_options(EDIT, fields)
    _require_prompt(values)
    if "source_prompt" not in values:
        if not recorded.get("prompt"):
            raise _invalid(
                "source_prompt",
                "No prompt is recorded in the video.",
                "Describe it in source_prompt.",
            )
        values["source_prompt"] = recorded["prompt"]
    return Task(EDIT, {"video": video, **_inherited(recorded, values, ("model", *_SIZE))}), parent


def read_extension(queue: JobQueue, fields: Fields) -> tuple[Task, str | None]:
    """Return a video that goes on from `video`, and the identifier of that one.

    It begins with the last 17 frames of `video`; `seconds` (default: as long as that one) is
    what comes after them.
    """
    fields = dict(fields)
    video = _reference(queue, fields.pop("video", None), "video")
    recorded, parent = _recorded(queue, video)
    values = read_options(GENERATE, fields)
    _require_prompt(values)
    values = _inherited(recorded, values, ("model", *_SIZE, "fps"))
    if "seconds" in fields:
        values["num_frames"] += MICRO_FRAME_SIZE
    elif "num_frames" not in values:
        values["num_frames"] = MICRO_FRAME_SIZE + _frames_of(queue, video)
    values["videos"] = [[video, "before", MICRO_FRAME_SIZE], *values.get("videos", [])]
    return Task(GENERATE, values), parent


def read_changes(fields: Fields, kind: str) -> dict[str, Any]:
    """Return the options to change in a repetition; null is an option's default."""
    changes = fields.get("changes", {})
    if not isinstance(changes, Mapping):
        raise _invalid("changes", "changes is not an object.", 'Send {"changes": {"seed": 2}}.')
    empty = dict.fromkeys(name for name, value in changes.items() if value is None)
    if unknown := empty.keys() - public_options(kind).keys() - edit_types().keys():
        read_options(kind, dict.fromkeys(unknown, ""))
    return read_options(kind, changes) | empty


def read_options(kind: str, fields: Fields) -> dict[str, Any]:
    """Return the options of a body as JSON values. Raises HttpError that names the field."""
    values = {name: value for name, value in fields.items() if value is not None}
    found: dict[str, Any] = {}
    if "size" in values:
        found |= _read_size(values.pop("size"))
    seconds = values.pop("seconds", None)
    known = public_options(kind)
    own = edit_types() if kind == EDIT else {}
    for name, value in values.items():
        if name in known:
            found[name] = _read_option(name, value)
        elif name in own:
            found[name] = _checked(name, as_int if own[name] == "int" else as_text, value)
        else:
            near = difflib.get_close_matches(str(name), [*known, *own, "size", "seconds"], n=1)
            fix = f"Did you mean {near[0]}?" if near else "GET /v1/options lists all."
            raise _invalid(str(name)[:80], f"There is no option {str(name)[:80]!r} here.", fix)
    if seconds is not None:
        found["num_frames"] = _read_seconds(seconds, float(found.get("fps") or _FPS))
    return found


def _read_option(name: str, value: Any) -> Any:
    """Return a value as JSON, as its option reads it. Text of a form may stand for any type."""
    kind = option_types()[name]
    if isinstance(value, str) and kind == "bool":
        value = {"true": True, "false": False}.get(value.lower(), value)
    if kind in ("images", "videos"):
        return _read_references(name, value)
    if name == "output":
        return _read_format(value)
    option = options()[name]

    def read(value: Any) -> Any:
        parsed = option.convert(value)
        option.check_range(parsed)
        return parsed

    parsed = _checked(name, read, value)
    return parsed if isinstance(parsed, (bool, int, float)) else str(parsed)


def _read_format(value: Any) -> str:
    name = str(value).lower()
    if name not in FORMATS:
        fix = f"Over HTTP it is a format: {', '.join(FORMATS)}."
        raise _invalid("output", f"Unknown output {str(value)[:80]!r}.", fix)
    return name


def _read_references(name: str, value: Any) -> list[list[Any]]:
    """Return a list of [id, ...] from JSON, also as text, or from the fields of a form."""
    wrong = _invalid(name, f"{name} is no list of ids.", 'Such as: [["file-...", 0]]')
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise wrong from None
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise wrong
    found = [[item] if isinstance(item, str) else item for item in items]
    for item in found:
        if not (isinstance(item, list) and item):
            raise wrong
        check_id(name, item[0])
    read = options()[name].convert
    return [list(entry) for entry in _checked(name, read, [tuple(item) for item in found])]


def check_id(name: str, id: Any) -> None:
    """Raise HttpError unless the field `name` holds an identifier, whether it exists or not."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise _invalid(
            name,
            f"{str(id)[:80]!r} is no upload or video.",
            "Upload files with POST /v1/files, and give their ids.",
        )


def _checked(name: str, read: Any, value: Any) -> Any:
    try:
        return read(value)
    except UsageError as error:
        raise _invalid(name, error.message, error.fix) from None
    except (ValueError, TypeError) as error:
        raise _invalid(name, f"{name} must be {error}, not {str(value)[:80]!r}.") from None


def _read_size(value: Any) -> dict[str, Any]:
    text = str(value).strip()
    if text in RESOLUTIONS:
        return {"resolution": text}
    match = _SIZE_TEXT.fullmatch(text)
    if match is None:
        names = ", ".join(RESOLUTIONS)
        raise _invalid("size", f"Unknown size {text[:40]!r}.", f"Give WIDTHxHEIGHT or {names}.")
    return {"width": int(match[1]), "height": int(match[2])}


def _read_seconds(value: Any, fps: float) -> int:
    """Return a number of frames. The lengths that Open-Sora names are whole chunks."""
    seconds: float = _checked("seconds", as_float, value)
    alias = f"{seconds:g}s"
    if fps == _FPS and alias in FRAME_ALIASES:
        return FRAME_ALIASES[alias]
    if not 0 < seconds * fps < 100_000:
        raise _invalid("seconds", f"{seconds:g} seconds are impossible.", "Give 2, 4, 8 or 16.")
    return max(1, round(seconds * fps))


def _reference(queue: JobQueue, value: Any, name: str) -> str:
    """Return the identifier of a file in a form, of {id}, or of a data: URL, which it uploads."""
    if hasattr(value, "file"):
        return queue.add_upload(value.file, value.filename or name).id
    if isinstance(value, Mapping) and isinstance(url := value.get("image_url"), str):
        return queue.add_upload(io.BytesIO(_read_data_url(url, name)), name).id
    if isinstance(value, Mapping):
        value = value.get("id") or value.get("file_id")
    if value is None:
        raise _invalid(name, f"{name} is missing.", 'Send a file, or {"id": "video_..."}.')
    check_id(name, value)
    return str(value)


def _read_data_url(url: str, name: str) -> bytes:
    match = _DATA_URL.match(url)
    try:
        if match is not None:
            return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        pass
    raise _invalid(
        name, "image_url is no data: URL in base64.", "The server fetches nothing: send the file."
    )


def _recorded(queue: JobQueue, id: str) -> tuple[Mapping[str, Any], str | None]:
    """Return the options behind an upload or a finished video, and the video's identifier."""
    if id.startswith("file-"):
        return queue.get_upload(id).request or {}, None
    job = queue.get(id)
    if job.state != DONE:
        raise HttpError(
            409,
            "wrong_state",
            f"{id} is not finished.",
            "Wait until it is completed.",
            param="video",
        )
    return job.task.options, id


def _frames_of(queue: JobQueue, id: str) -> int:
    if id.startswith("file-"):
        return queue.get_upload(id).frames
    plan = queue.get(id).plan
    return plan.frames if plan is not None else MICRO_FRAME_SIZE


def _inherited(recorded: Fields, values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return `values`, with the options `names` of the record that they leave open."""
    if any(name in values for name in _SIZE):
        names = tuple(name for name in names if name not in _SIZE)
    taken = {n: recorded[n] for n in names if recorded.get(n) is not None}
    return taken | values


def _require_prompt(values: Mapping[str, Any]) -> None:
    if not str(values.get("prompt", "")).strip():
        raise _invalid("prompt", "The prompt is empty.", "Say in `prompt` what the video shows.")


def _invalid(param: str, message: str, fix: str = "") -> HttpError:
    return HttpError(400, "invalid_value", message, fix, param=param)
