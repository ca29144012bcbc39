"""Options of requests over HTTP, made from the fields of GenerationRequest and EditRequest."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mlx_sora.request.edit import INJECT_STEPS, SAMPLER, EditRequest
from mlx_sora.request.generation import GenerationRequest, options, options_of
from mlx_sora.request.options import Option
from mlx_sora.request.presets import PRESETS
from mlx_sora.server.checks import FORMATS, RESERVED

#: What is different over HTTP: there are no paths and no terminal.
_OVER_HTTP: dict[str, dict[str, Any]] = {
    "prompt": {"help": "text prompt"},
    "model": {"help": "name of a model, see /v1/models; default: the first of them"},
    "output": {
        "help": "format of the file; default: mp4, of an image png",
        "type": "choice",
        "choices": list(FORMATS),
        "metavar": "FORMAT",
    },
}

#: Types of fields by their annotation, without "| None". The others are texts.
_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "tuple[ImageReference, ...]": "images",
    "tuple[VideoReference, ...]": "videos",
}

#: JSON Schema of each type. Lists hold ids of uploads or videos, never paths.
_SCHEMAS: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "text": {"type": "string"},
    "choice": {"type": "string"},
    "images": {
        "type": "array",
        "items": {"description": "ID, or [ID, FRAME, STRENGTH]"},
        "examples": [["file-0123456789abcdefghijklmnop", "last"]],
    },
    "videos": {
        "type": "array",
        "items": {"description": "ID, or [ID, SIDE, FRAMES, STRENGTH]"},
        "examples": [["video_0123456789abcdefghijklmnop", "before", 17]],
    },
}

#: Fields that the video API has beside the options.
_API_FIELDS: dict[str, dict[str, Any]] = {
    "seconds": {
        "type": ["string", "number"],
        "description": "length; 2, 4, 8, 16 and 32 are the lengths of Open-Sora (51 frames and "
        "multiples), others count frames at the frame rate",
    },
    "size": {"type": "string", "description": "WIDTHxHEIGHT, or 144p to 720p"},
    "input_reference": {
        "description": "a picture to begin with: a file, {file_id} of an upload, or {image_url} "
        "with a data: URL",
    },
}


def public_options(task: str) -> dict[str, Option]:
    """Return the options of generate or edit that a client may set."""
    own = options_of(task).items()
    return {n: o for n, o in own if n not in RESERVED and not o.python_only}


def option_types() -> dict[str, str]:
    """Return the type of each option: bool, int, float, text, choice, images or videos."""
    found = {f.name: _TYPES.get(_plain(f.type), "text") for f in fields(GenerationRequest)}
    return found | {name: "choice" for name, option in options().items() if option.choices}


def edit_types() -> dict[str, str]:
    """Return the types of the options that only edits have, but for their video."""
    return {
        f.name: _TYPES.get(_plain(f.type), "text")
        for f in fields(EditRequest)
        if f.name not in ("video", "target")
    }


def option_records(task: str) -> list[dict[str, Any]]:
    """Return what a form needs to know of each option of generate or edit, as JSON values."""
    types = option_types()
    records = [
        {
            "name": name,
            "flag": option.label,
            "help": option.help,
            "group": option.group,
            "common": option.common,
            "type": types[name],
            "choices": list(option.choices),
            "default": SAMPLER if (task, name) == ("edit", "sampler") else _json(option.default),
            "low": option.low,
            "high": option.high,
            "metavar": option.metavar,
            "repeatable": option.many,
        }
        | _OVER_HTTP.get(name, {})
        for name, option in public_options(task).items()
    ]
    own = edit_types() if task == "edit" else {}
    return records + [_edit_record(name, kind) for name, kind in own.items()]


def preset_records() -> list[dict[str, Any]]:
    """Return name, description and options of each preset."""
    return [
        {"name": name, "description": preset.description, "values": dict(preset.values)}
        for name, preset in PRESETS.items()
    ]


def body_schema(task: str, required: tuple[str, ...] = ("prompt",), **more: Any) -> dict[str, Any]:
    """Return the JSON Schema of a body that makes a video; `more` are fields besides."""
    api = _API_FIELDS if task == "generate" else {}
    properties = {r["name"]: _option_schema(r) for r in option_records(task)} | api | more
    return {"type": "object", "properties": properties, "required": list(required)}


def body_docs(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the part of OpenAPI that says that a body is JSON or multipart, in this schema."""
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {k: {"schema": schema} for k in kinds}}}


_EDIT_HELP = {
    "source_prompt": "description of the video; default: the prompt that is recorded in it",
    "inject_steps": "first steps in which spatial attention uses the values of the video; "
    f"default: {INJECT_STEPS}",
}


def _edit_record(name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "flag": f"--{name.replace('_', '-')}",
        "help": _EDIT_HELP[name],
        "group": "generation",
        "common": True,
        "type": kind,
        "choices": [],
        "default": None,
        "low": None,
        "high": None,
        "metavar": "N" if kind == "int" else "TEXT",
        "repeatable": False,
    }


def _option_schema(record: dict[str, Any]) -> dict[str, Any]:
    schema = {**_SCHEMAS[record["type"]], "description": record["help"]}
    limits = {"enum": "choices", "minimum": "low", "maximum": "high", "default": "default"}
    return schema | {k: record[n] for k, n in limits.items() if record[n] not in (None, [], "")}


def _plain(annotation: Any) -> str:
    return str(annotation).removesuffix(" | None")


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
