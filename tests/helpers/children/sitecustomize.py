"""Imported at the start of every Python that a test starts: MLX takes the device of the tests."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _MlxFinder(MetaPathFinder):
    """Sets the device when MLX is loaded, so that processes without MLX stay light."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_set(module: ModuleType) -> None:
                load(module)
                module.set_default_device(module.cpu)

            spec.loader.exec_module = load_and_set  # type: ignore[method-assign]
        return spec


if os.environ.get("MLX_SORA_TEST_DEVICE") == "cpu":
    sys.meta_path.insert(0, _MlxFinder())
