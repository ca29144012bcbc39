"""House rules that a tree can check: sizes, no print, no stubs, no state in modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from benchmarks.all import CAMPAIGNS, ROOT, TABLE, TOOLS
from tests.helpers.source import Source, sources

EVERYWHERE = ("mlx_sora", "tests", "benchmarks", "examples")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 8

#: Folders whose files may be longer: one network per file, and tables of options.
LONGER = {"mlx_sora/models/": 600, "mlx_sora/request/": 600}


def test_files_are_short() -> None:
    lengths = {s.name: s.text.count("\n") for s in sources(*EVERYWHERE)}
    assert {name: n for name, n in lengths.items() if n > limit(name)} == {}


def limit(name: str) -> int:
    """Lines that a file may have."""
    return next((n for folder, n in LONGER.items() if name.startswith(folder)), MAX_FILE)


def test_functions_are_short() -> None:
    long = {
        f"{s.name}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1
        for s in sources(*EVERYWHERE)
        for f in s.functions()
        if f.end_lineno is not None and f.end_lineno - f.lineno >= MAX_FUNCTION
    }
    assert long == {}


def test_functions_take_few_parameters() -> None:
    wide = {
        f"{s.name}:{f.lineno} {f.name}": count
        for s in sources(*EVERYWHERE)
        for f in s.functions()
        if (count := len([*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs])) > MAX_PARAMETERS
    }
    assert wide == {}


def test_only_the_command_line_prints() -> None:
    found = [
        f"{s.name}:{node.lineno}"
        for s in sources("mlx_sora")
        if not s.module.startswith("mlx_sora.cli")
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert found == []


def test_networks_leave_nothing_in_a_thread() -> None:
    """`models/layers.py` says why, and has what stands for these."""
    words = ("mx.compile(", "@mx.compile", "(mx.compile", "nn.Linear(", "nn.Embedding(", "nn.Conv")
    found = [
        f"{s.name}: {word}"
        for s in sources("mlx_sora")
        if s.name != "mlx_sora/models/layers.py"
        for word in words
        if word in s.text
    ]
    assert found == []


def test_random_numbers_have_a_key() -> None:
    """Those without one are the caller's, and draws that wait for evaluation pile up."""
    found = [
        f"{s.name}:{node.lineno}"
        for s in sources("mlx_sora")
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Call)
        and re.fullmatch(r"mx\.random\.(?!key|split).*", ast.unparse(node.func))
        and "key" not in (word.arg for word in node.keywords)
    ]
    assert found == []


def test_nothing_is_left_unimplemented() -> None:
    found = [
        f"{s.name}:{node.lineno}"
        for s in sources("mlx_sora")
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)
    ]
    assert found == []


def test_no_function_writes_a_module_global() -> None:
    found = [
        f"{s.name}:{node.lineno}"
        for s in sources("mlx_sora")
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_modules_classes_and_public_functions_of_the_package_say_what_they_are() -> None:
    """Methods may follow from their class; everything a reader can import has a docstring."""
    missing = [
        f"{s.name}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', '')}"
        for s in sources("mlx_sora")
        for node in (s.tree, *s.tree.body)
        if s.text.strip()  # an empty __init__ only marks a package
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and not getattr(node, "name", "").startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert missing == []


#: Words that name nothing in the field: participles that do not say of what, and metaphors.
BANNED = {
    *("told", "alone", "begun", "anew", "spared", "kept", "made", "given", "asked", "wanted"),
    *("crew", "parcel", "claim", "claimed", "stranger", "strangers", "lessen", "hearing"),
    *("foretell", "foretold", "forecast", "halves"),
}


def names(source: Source) -> Iterator[tuple[int, str]]:
    """Yield line and name of every class, function, parameter and class attribute."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield each.lineno, each.arg
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.lineno, statement.target.id


def test_names_are_words_of_the_field() -> None:
    found = [
        f"{s.name}:{line} {name}"
        for s in sources("mlx_sora")
        for line, name in names(s)
        if BANNED & set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))
    ]
    assert found == []


def test_public_classes_have_different_names() -> None:
    places: dict[str, list[str]] = {}
    for s in sources("mlx_sora"):
        for node in s.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(s.name)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    """With a verb or a noun, never with a question word; ruff's D401 wants the imperative."""
    found = [
        f"{s.name}:{getattr(node, 'lineno', 1)} {doc.splitlines()[0]}"
        for s in sources("mlx_sora")
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (doc := ast.get_docstring(node))
        and doc.split()[0] in ("What", "Whether", "Where", "How", "Which", "Those", "Whatever")
    ]
    assert found == []


def test_every_benchmark_is_measured_again_by_one_command() -> None:
    """`python -m benchmarks.all` knows each module and each result: see CONTRIBUTING."""
    commands = [command.split()[:2] for entry in TABLE.values() for command in entry.commands]
    run = {words[words[0] == "-m"].rpartition("/")[2] for words in commands}
    named = {word.removeprefix("benchmarks.").removesuffix(".py") for word in run} | {*TOOLS}
    assert {path.stem for path in ROOT.glob("benchmarks/*.py")} - named == set()
    written = {file for entry in TABLE.values() for file in entry.writes}
    results = {f"benchmarks/results/{path.name}" for path in ROOT.glob("benchmarks/results/*.json")}
    assert results - written == {f"benchmarks/results/{name}.json" for name in CAMPAIGNS}
