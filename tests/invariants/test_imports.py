"""`import mlx_sora` is light, and run time never needs what only training or tests use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mlx_sora
from tests.helpers.source import Source, sources

HEAVY = {"av", "PIL", "huggingface_hub", "bs4", "ftfy", "numpy", "mlx", "sentencepiece", "tqdm"}
FOREIGN = {"torch", "transformers", "diffusers", "cv2", "pydantic", "rich", "scipy", "skimage"}


def modules_loaded_by(statement: str) -> list[str]:
    """Return the modules in memory after `statement` in a new interpreter."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return list(json.loads(result.stdout))


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages in memory after `statement` in a new interpreter."""
    return {name.split(".")[0] for name in modules_loaded_by(statement)}


def test_the_package_is_light() -> None:
    assert loaded_by("import mlx_sora") & (HEAVY | FOREIGN) == set()


def test_errors_and_requests_need_no_mlx() -> None:
    statement = "from mlx_sora import GenerationRequest; GenerationRequest(prompt='a')"
    assert loaded_by(statement) & (HEAVY | FOREIGN) == set()


def test_the_pipeline_loads_no_downloader_converter_or_doctor() -> None:
    names = modules_loaded_by("import mlx_sora.pipeline, mlx_sora; mlx_sora.Pipeline")
    assert "mlx_sora.loading.networks" in names
    assert [name for name in names if name.startswith("mlx_sora.manage")] == []


def test_only_info_and_the_command_line_import_manage() -> None:
    users = {
        source.name
        for source in sources("mlx_sora")
        for _, name in source.imports()
        if name.startswith("mlx_sora.manage")
    }
    expected = ("mlx_sora/manage/", "mlx_sora/cli/", "mlx_sora/pipeline/pipeline.py")
    expected += ("mlx_sora/server/planning.py", "mlx_sora/server/helper_process.py")
    assert [name for name in users if not name.startswith(expected)] == []


def needs_serve_extra(source: Source) -> bool:
    """True for modules of the server that import what its extra installs, or such a module."""
    web = {"fastapi", "starlette", "uvicorn"}
    return any(name.split(".")[0] in web for _, name in source.imports())


def test_every_module_imports_without_the_heavy_formats() -> None:
    """File formats, hub and HTML parser load in the functions that need them."""
    modules = [
        s.module
        for s in sources("mlx_sora")
        if not s.module.endswith("__main__") and not needs_serve_extra(s)
    ]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert loaded & (FOREIGN | {"av", "PIL", "huggingface_hub", "bs4", "ftfy"}) == set()


def test_the_engine_never_imports_foreign_frameworks() -> None:
    found = [
        f"{source.name}:{line} {name}"
        for source in sources("mlx_sora")
        for line, name in source.imports()
        if name.split(".")[0] in FOREIGN
    ]
    assert found == []


@pytest.mark.parametrize("source", sources("benchmarks", "examples"), ids=lambda s: s.name)
def test_what_computes_has_the_fast_blas(source: Source) -> None:
    """The package puts it in place, which MLX has to find when it is loaded."""
    at_once = {node.lineno for node in source.tree.body}
    order = [name.split(".")[0] for line, name in source.imports() if line in at_once]
    assert "mlx" not in order or "mlx_sora" in order[: order.index("mlx")]


@pytest.mark.parametrize("name", mlx_sora.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mlx_sora, name) is not None
    assert name in dir(mlx_sora)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Pipelines"):
        mlx_sora.Pipelines  # noqa: B018
