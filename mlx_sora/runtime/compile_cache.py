"""The folder in which MLX's CPU backend keeps the kernels that it compiles.

It is one for all users of a machine: mlx/VERSION/cpu in the folder for temporary files
(mlx/backend/cpu/compiled.cpp). Where MLX cannot use it, the first compiled function fails.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

log = logging.getLogger(__name__)


def ensure_compile_cache() -> None:
    """Turn MLX's compiled functions off if their folder is missing, read-only or of another user.

    They then run operation by operation: slower, with results equal to rounding. Logs a warning.
    """
    if sys.platform != "linux" or "MLX_DISABLE_COMPILE" in os.environ:
        return
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # std::filesystem::temp_directory_path
    root = Path(next((os.environ[name] for name in names if os.environ.get(name)), "/tmp"))
    folder = root / "mlx" / version("mlx") / "cpu"
    reason = _fault(root, folder)
    if not reason:
        return
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # for MLX that is not loaded yet, and for children
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].disable_compile()
    log.warning(
        "MLX cannot keep compiled kernels in %s (%s): runs are slower; set TMPDIR to a folder of "
        "yours",
        folder,
        reason,
    )


def _fault(root: Path, folder: Path) -> str:
    """Return why MLX cannot use `folder`; empty if it can."""
    if not root.is_dir():
        return "no such folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return "it belongs to another user"
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return "nothing may be executed there"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""
