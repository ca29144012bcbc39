"""The files of the page: small, complete in themselves, and without HTML made from text."""

from __future__ import annotations

import re
from pathlib import Path

import mlx_sora

PAGE = Path(mlx_sora.__file__).parent / "server" / "page"


def text_of(*suffixes: str) -> dict[str, str]:
    return {p.name: p.read_text() for p in PAGE.iterdir() if p.suffix in suffixes}


def test_the_first_page_takes_at_most_100_kb() -> None:
    assert sum(path.stat().st_size for path in PAGE.iterdir()) <= 100_000


def test_files_load_nothing_from_other_hosts() -> None:
    addresses = {
        name: re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z][^\s\"']*", text)
        for name, text in text_of(".html", ".css", ".js", ".svg").items()
    }
    addresses["icon.svg"].remove("http://www.w3.org/2000/svg")  # a name, which nobody loads
    assert {name: found for name, found in addresses.items() if found} == {}


def test_text_never_becomes_html_or_code() -> None:
    words = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(")
    found = [(n, w) for n, text in text_of(".js").items() for w in words if w in text]
    assert found == []


def test_the_page_has_no_inline_code_that_its_policy_refuses() -> None:
    html = text_of(".html")["index.html"]
    assert re.findall(r"<script(?![^>]*src=)|\son[a-z]+=|\sstyle=|javascript:", html) == []


def test_the_page_loads_every_file_and_no_other() -> None:
    html = text_of(".html")["index.html"]
    named = set(re.findall(r"/static/([a-z.]+)", html))
    assert named == {path.name for path in PAGE.iterdir()} - {"index.html"}


def test_scripts_find_the_elements_that_they_name() -> None:
    html = text_of(".html")["index.html"]
    ids = set(re.findall(r'\sid="([a-z-]+)"', html))
    used = {
        name for text in text_of(".js").values() for name in re.findall(r'\$\("([^"]+)"\)', text)
    }
    assert used <= ids
