"""Origin and checksums of a model's files: a JSON file in the folder, written when it is complete.

{"format": 1, "model": "opensora-1.2", "written_by": "mlx_sora 0.1.0", "written_at": "...",
 "endpoint": "...",
 "conversion": {"source": "...", "bits": 8, "dtype": null, "fingerprint": "<sha256>"},
 "files": {"vae/config.json": {"repo": "...", "revision": "<commit>", "name": "config.json",
                               "bytes": 1234, "sha256": "..."}}}

conversion: only in folders that `convert` wrote; with --gptq, it has prompts and steps of that as
"gptq". bytes and sha256 describe the file in this folder,
repo and revision the source of its part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_sora import __version__
from mlx_sora.errors import WeightsError
from mlx_sora.manage.progress import ProgressCallback, byte_counter, ignore_progress
from mlx_sora.request.generation import FLOAT_DTYPES
from mlx_sora.request.options import as_quantization
from mlx_sora.utils.files import atomic_write, sha256
from mlx_sora.utils.json import read_object

FILE = "provenance.json"
FORMAT = 1

#: Longest path in a model folder, in characters.
MAX_NAME = 200

_FIX = "Move the folder away and get the model again."


@dataclass(frozen=True)
class FileOrigin:
    """Origin of a file: hub repository, commit and name in it; size and checksum of the file."""

    repo: str
    revision: str
    name: str
    bytes: int
    sha256: str

    @property
    def is_valid(self) -> bool:
        """True if every field has the type that `Provenance.write` gives it."""
        texts = (self.repo, self.revision, self.name, self.sha256)
        return type(self.bytes) is int and all(isinstance(text, str) for text in texts)

    @property
    def folder(self) -> str:
        """Folder in the repository; "" is its root."""
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Provenance:
    """Origin of every file of a model, by its path in the model folder.

    conversion: source and options of a converted model; empty for a downloaded one.
    """

    model: str
    endpoint: str
    files: Mapping[str, FileOrigin]
    conversion: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write provenance.json into `folder`, atomically. Raises WeightsError."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "written_by": f"mlx_sora {__version__}",
            "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "endpoint": self.endpoint,
            **({"conversion": dict(self.conversion)} if self.conversion else {}),
            "files": {path: asdict(origin) for path, origin in sorted(self.files.items())},
        }
        with atomic_write(folder / FILE, overwrite=True, error=WeightsError) as file:
            file.partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Provenance | None:
        """Read the provenance of `folder`, None if it has none. Raises WeightsError if damaged."""
        path = folder / FILE
        try:
            content = read_object(path)
            files = {name: FileOrigin(**row) for name, row in content["files"].items()}
            model, endpoint = content["model"], content["endpoint"]
            conversion = content.get("conversion", {})
            valid = conversion == {} or _is_valid_conversion(conversion)
            named = all(isinstance(content[name], str) for name in ("model", "endpoint"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WeightsError(f"Cannot read {path}: {error.strerror}.", "Check rights.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path} is damaged.", _FIX) from error
        if not valid:
            raise WeightsError(f"{path} is damaged: see its conversion.", _FIX)
        if not named:
            raise WeightsError(f"{path} is damaged: model and endpoint are texts.", _FIX)
        for name, origin in files.items():
            pure = PurePosixPath(name)
            outside = pure.is_absolute() or ".." in pure.parts or not pure.parts
            if outside or not name.isprintable() or len(name) > MAX_NAME or not origin.is_valid:
                raise WeightsError(f"{path} is damaged: see {name!r}.", _FIX)
        return cls(model, endpoint, files, conversion)

    @property
    def nbytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(origin.bytes for origin in self.files.values())

    def part_origins(self, part: str) -> list[FileOrigin]:
        """Return the origins of the files of one part."""
        return [origin for path, origin in self.files.items() if path.startswith(f"{part}/")]

    def damaged_files(
        self, folder: Path, checksums: bool = False, on_progress: ProgressCallback = ignore_progress
    ) -> list[str]:
        """Return the paths of files with a wrong size or, with `checksums`, another content."""
        damaged = []
        for name, origin in self.files.items():
            file = folder / name
            wrong = not file.is_file() or file.stat().st_size != origin.bytes
            if checksums and not wrong:
                counter = byte_counter(on_progress, "check", name, origin.bytes)
                try:
                    wrong = sha256(file, counter) != origin.sha256
                except OSError:  # a disk that fails
                    wrong = True
            if wrong:
                damaged.append(name)
        return damaged


def _is_valid_conversion(conversion: Mapping[str, Any]) -> bool:
    # The doctor puts these values into a command for the user to type.
    settings = conversion["quantization"]
    return (
        isinstance(conversion["source"], str)
        and conversion["dtype"] in (None, *FLOAT_DTYPES)
        and (settings is None or _is_quantization(settings))
        and ("gptq" not in conversion or _is_gptq(**conversion["gptq"]))
    )


def _is_gptq(prompts: Any, steps: Any, distill: Any = 0) -> bool:
    texts = isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)
    return texts and type(steps) is int and type(distill) is int


def _is_quantization(settings: Any) -> bool:
    if isinstance(settings, dict):
        return "bits" in settings and all(type(n) is int for n in settings.values())
    try:
        return isinstance(settings, str) and as_quantization(settings) == settings
    except ValueError:
        return False
