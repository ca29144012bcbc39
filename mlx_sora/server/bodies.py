"""Bodies of requests as fields: JSON objects, and forms with files, as video clients send them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from mlx_sora.server.http_errors import HttpError
from mlx_sora.utils.files import explain_os_errors
from mlx_sora.utils.json import parse_object

#: Files and fields in a form, and bytes of a field.
MAX_FILES, MAX_FIELDS, MAX_FIELD = 8, 200, 1_000_000

_KEY = re.compile(r"([A-Za-z0-9_-]{1,80})((?:\[[A-Za-z0-9_-]{0,80}\]){0,4})", re.ASCII)


async def read_fields(request: Request) -> AsyncIterator[dict[str, Any]]:
    """Yield the fields of a body; files of a form have `file` and `filename`, and end with it.

    Raises HttpError for another type and for what is malformed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield _read_json(await request.body())
    elif kind == "multipart/form-data":
        form = await _read_form(request)
        try:
            yield nested(form.multi_items())
        finally:
            await form.close()
    elif not kind and not await request.body():
        yield {}
    else:
        raise HttpError(
            400,
            "malformed",
            f"Bodies of the type {kind[:60]!r} are not read.",
            "Send JSON with Content-Type: application/json, or multipart/form-data.",
        )


async def _read_form(request: Request) -> FormData:
    """Return a form, with its files in the system's temporary folder."""
    try:
        with explain_os_errors(Path(tempfile.gettempdir(), "upload")):
            return await request.form(
                max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD
            )
    except (HTTPException, FormParserError) as error:  # the latter up to starlette 0.45
        reason = getattr(error, "detail", error)
        raise HttpError(400, "malformed", f"The form is malformed: {reason}") from None


def nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return form fields as objects and lists: a[b]=1 is {a: {b: 1}}, a[]=1 is {a: [1]}.

    a[][]=1 is {a: [[1]]}: one list inside a list, as forms cannot tell where the next begins.
    """
    found: dict[str, Any] = {}
    for key, value in items:
        match = _KEY.fullmatch(key)
        if match is None:
            raise HttpError(400, "malformed", f"{key[:80]!r} is no name of a field.")
        _put(found, [match[1], *re.findall(r"\[([^\]]*)\]", match[2])], value)
    return found


def _put(target: Any, path: list[str], value: Any) -> None:
    first, rest = path[0], path[1:]
    if isinstance(target, list):
        if not rest:
            target.append(value)
            return
        if not target or not isinstance(target[-1], (list, dict)):
            target.append([] if rest[0] == "" else {})
        _put(target[-1], rest, value)
        return
    if first in target and not (rest and isinstance(target[first], (list, dict))):
        raise HttpError(400, "malformed", f"The field {first!r} comes twice.", param=first)
    if not rest:
        target[first] = value
        return
    inner = target.setdefault(first, [] if rest[0] == "" else {})
    if isinstance(inner, list) != (rest[0] == ""):
        raise HttpError(400, "malformed", f"The field {first!r} is a list and an object.")
    _put(inner, rest, value)


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        return parse_object(body or b"{}")
    except ValueError as error:
        raise HttpError(400, "malformed", f"The body is no JSON: {error}.") from None
