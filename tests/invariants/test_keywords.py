"""The typed keywords of the Python API are the fields of the requests."""

from __future__ import annotations

import ast
import inspect

from mlx_sora import Pipeline
from mlx_sora.request import keywords as module
from mlx_sora.request.generation import options_of
from tests.invariants.keywords import FILE, keywords


def test_the_keywords_are_in_step_with_the_fields() -> None:
    found, expected = (ast.dump(ast.parse(text)) for text in (FILE.read_text(), keywords()))
    assert found == expected, "run: python -m tests.invariants.readme"


def test_calls_take_the_keywords_of_their_command() -> None:
    """The prompt has a parameter of its own; `calibrate` and `bench` have no call."""
    generation = module.GenerationKeywords.__annotations__
    assert {*generation, "prompt"} == {*options_of("generate")} | {"memory_budget"}
    edit = {*module.EditKeywords.__annotations__, "prompt"} - {"inject_steps"}
    assert edit == {*options_of("edit")}
    for method, name in (("__call__", "Generation"), ("stream", "Generation"), ("edit", "Edit")):
        options = inspect.signature(getattr(Pipeline, method)).parameters["options"]
        assert options.annotation == f"Unpack[{name}Keywords]"


def test_type_checkers_find_an_editable_install() -> None:
    """Only then does setuptools put the folder on the path; `.ci/run` asks mypy itself."""
    text = (FILE.parents[2] / "pyproject.toml").read_text()
    assert '\npackage-dir = { "" = "." }\n' in text
