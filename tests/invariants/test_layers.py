"""Layers, import circles and the root of the package; networks do not know accelerations."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.source import Source, sources

#: From low to high; a module may import its own layer and those before it.
LAYERS = (
    ("utils", "errors", "geometry", "request"),
    ("models", "runtime"),
    ("memory", "loading", "sampling", "text", "video", "conditioning"),
    ("accel", "distributed"),
    ("pipeline", "manage"),
    ("server",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def rank(module: str) -> int:
    """Layer of a dotted module name; the package itself re-exports all that the cli may use."""
    parts = module.split(".")
    return RANK[parts[1]] if len(parts) > 1 else RANK["cli"]


def violations(source: Source) -> list[str]:
    """Imports of `source` that reach up."""
    own, found = rank(source.module), []
    for line, name in source.imports():
        parts = name.split(".")
        # `from mlx_sora import x` of something that is no module asks the package, the top.
        target = name if len(parts) > 1 and parts[1] in RANK else parts[0]
        constant = name == "mlx_sora.__version__"
        if parts[0] == "mlx_sora" and not constant and rank(target) > own:
            found.append(f"{source.name}:{line} imports {name}")
    return found


def test_every_module_has_a_layer() -> None:
    names = {s.module.split(".")[1] for s in sources("mlx_sora") if "." in s.module}
    assert names <= RANK.keys(), f"say in LAYERS where {names - RANK.keys()} belong"


def test_lower_layers_do_not_import_higher_ones() -> None:
    assert [v for source in sources("mlx_sora") for v in violations(source)] == []


def imported_modules() -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, for type checkers too."""
    modules = {source.module: source for source in sources("mlx_sora")}
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        targets = set()
        for _, name in source.imports(type_checking=True):
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]
            targets.add(name)
        graph[module] = (targets & modules.keys()) - {module, "mlx_sora"}
    return graph


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imported_modules()
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_root_of_the_package_holds_only_what_everything_needs() -> None:
    root = {source.path.name for source in sources("mlx_sora") if source.module.count(".") < 2}
    loose = {name for name in root if name != "__init__.py"}
    assert loose == {"__main__.py", "errors.py", "geometry.py"}


def test_the_package_has_few_files() -> None:
    assert len(sources("mlx_sora")) <= 240


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("from mlx_sora.cli import main", 1),
        ("def f():\n    import mlx_sora.pipeline.pipeline", 1),
        ("from mlx_sora import Pipeline", 1),
        ("from ..accel import registry", 1),
        ("from mlx_sora import errors\nfrom . import ops", 0),
        ("from mlx_sora import __version__", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlx_sora.video", 0),
    ],
)
def test_the_check_finds_what_it_should(
    code: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(sources("mlx_sora")[0].path.parent / "models" / "made_up.py")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: code)
    assert len(violations(source)) == count


def test_networks_and_samplers_do_not_name_an_acceleration() -> None:
    words = re.compile(r"\b(lpl|tdtm|ci_?-?dl)\b|_(lpl|tdtm|cidl)|(lpl|tdtm|cidl)_", re.IGNORECASE)
    found = [
        f"{source.name}: {match[0]}"
        for source in sources("mlx_sora/models", "mlx_sora/sampling")
        for match in words.finditer(source.text)
    ]
    assert found == []
