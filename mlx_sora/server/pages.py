"""The page, its files and the documentation of the API, without anything from other hosts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from mlx_sora.server.http_errors import HttpError
from mlx_sora.server.security import COOKIE, same_token
from mlx_sora.server.videos import file_response

#: The files of the page.
PAGE = Path(__file__).parent / "page"

#: Seconds for which a browser keeps the token.
_COOKIE_AGE = 90 * 24 * 3600

#: Answer to the link with the token. Loading the page again, from here, leaves the link behind
#: and sends the cookie even if another site has led to it.
_LOGIN = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" '
    'content="0; url=/"><title>mlx_sora</title><p><a href="/">mlx_sora</a></p></html>'
)

router = APIRouter(include_in_schema=False)


@router.get("/")
def index(request: Request) -> Response:
    """Return the page. The link with the token sets a cookie."""
    token, offered = request.app.state.access.token, request.query_params.get("token", "")
    if token is None or not same_token(offered, token):
        return _page_file(request, "index.html")
    response = HTMLResponse(_LOGIN, headers={"cache-control": "no-store"})
    response.set_cookie(COOKIE, token, max_age=_COOKIE_AGE, httponly=True, samesite="strict")
    return response


@router.get("/static/{name}")
def static(request: Request, name: str) -> Response:
    """Return a file of the page."""
    return _page_file(request, name)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Return the documentation of the API, made from /openapi.json."""
    return HTMLResponse("".join(_docs(request.app.openapi())))


def _page_file(request: Request, name: str) -> Response:
    files = {path.name: path for path in PAGE.iterdir() if path.is_file()} if PAGE.is_dir() else {}
    if name not in files:
        raise HttpError(404, "not_found", f"There is no page {name[:80]!r}.", "Open /.")
    return file_response(request, files[name], headers={})


def _docs(api: Mapping[str, Any]) -> Iterator[str]:
    info = api["info"]
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{escape(info['title'])}: API</title></head><body><main>"
    yield f"<h1>{escape(info['title'])} {escape(info['version'])}: API</h1>"
    yield f'<p>{escape(info["description"])} <a href="/openapi.json">openapi.json</a></p>'
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield f"<h2>{method.upper()} {escape(path)}</h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            yield from _table("Parameters", operation.get("parameters", ()))
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            fields = schema.get("properties", {}).items()
            required = schema.get("required", ())
            rows = [{"name": n, "schema": s, "required": n in required} for n, s in fields]
            yield from _table(f"Body: {' or '.join(content)}", rows)
    yield "</main></body></html>"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield f"<details><summary>{escape(title)} ({len(rows)})</summary><table>"
    for row in rows:
        schema = row.get("schema", {})
        kinds = schema.get("enum") or schema.get("type") or ""
        kind = kinds if isinstance(kinds, str) else ", ".join(str(k) for k in kinds)
        text = row.get("description") or schema.get("description", "")
        mark = ", required" if row.get("required") else ""
        yield f"<tr><th scope=row>{escape(row['name'])}</th><td>{escape(kind)}{mark}</td>"
        yield f"<td>{escape(text)}</td></tr>"
    yield "</table></details>"
