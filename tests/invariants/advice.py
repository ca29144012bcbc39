"""Advice in the source: texts that name a flag or a command for the user to type."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.helpers.source import Source, sources

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
COMMAND = re.compile(
    r"\bmlx_sora (generate|edit|reconstruct|serve|download|models|convert|info|doctor|calibrate"
    r"|bench)\b"
)

#: Programs of others.
PROGRAMS = re.compile(r"\b(pip install|git|mv|sips|mlx\.launch) ")

#: Calls whose texts are help, not advice.
_HELP = {"add_argument", "add_parser", "add_argument_group", "Parser", "option", "partial"}
_HELP |= {"_conditioning", "_memory", "_output", "_size", "add_prompts_flag", "compile"}

#: Statements about a flag, with nothing to type.
_STATEMENT = re.compile(
    r"^--[a-z-]+ ({} )?((changes|(can )?save|saves|merges) nothing|covers|has no effect)"
    r"|^{} more options|mlx_sora {}|\(--device-profile {}\)|^{} has the speeds|import mlx_sora"
    r"|^Memory budget {}|version of mlx_sora that|is not used|^--preset {}$|^--show needs"
    r"|^--memory-budget auto$"
)


@cache
def templates() -> tuple[tuple[str, str], ...]:
    """Return file and text, with {} for values, of every string that names a flag or a command."""
    return tuple(found for source in sources("mlx_sora") for found in _templates(source))


def _templates(source: Source) -> Iterator[tuple[str, str]]:
    if not any(each.search(source.text) for each in (FLAG, COMMAND, PROGRAMS)):
        return
    left_out = set(_left_out(source.tree))
    for node in ast.walk(source.tree):
        if id(node) not in left_out and (text := _text(node)) and is_advice(text):
            yield source.name, text


def is_advice(text: str) -> bool:
    """Return True for a sentence with something to type."""
    names = FLAG.search(text) or COMMAND.search(text) or PROGRAMS.search(text)
    sentence = " " in text.strip() and "\n" not in text
    return bool(names) and sentence and not _STATEMENT.search(text)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return ""
    return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)


def _left_out(tree: ast.Module) -> Iterator[int]:
    """Yield the nodes in help, docstrings, complaints (first words of errors) and larger texts."""
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            inside = [node] if name in _HELP else node.args[:1] if name.endswith("Error") else []
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside = [node.value]
        elif isinstance(node, ast.JoinedStr):
            inside = [*node.values]
        for each in inside:
            yield from map(id, ast.walk(each))
