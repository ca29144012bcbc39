"""Only line feeds end a line of a prompt file.

Reports: wbolster/jsonlines #53, volcengine/OpenViking #3984.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_sora.cli.requests import read_prompt_file

INSIDE = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e", "\r"]


@pytest.mark.parametrize("mark", INSIDE, ids=ascii)
def test_text_may_hold_other_line_ends(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a{mark}b\r\nc\n".encode())
    assert [r.prompt for r in read_prompt_file(str(path), {}, None).requests] == [f"a{mark}b", "c"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"], ids=ascii)
def test_strings_of_json_may_too(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in (f"a{mark}b", "c")]
    path.write_text("\n".join(lines), encoding="utf-8")
    batch = read_prompt_file(str(path), {}, None)
    assert not batch.failures
    assert [request.prompt for request in batch.requests] == [f"a{mark}b", "c"]
    assert batch.lines == [1, 2]
