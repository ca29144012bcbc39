"""Where a model's files came from: one JSON file inside the model folder, written when it is whole.

{"format": 1, "model": "opensora-1.2", "written_by": "mlx_sora 0.1.0", "written_at": "...",
 "endpoint": "...",
 "conversion": {"source": "...", "bits": 8, "dtype": null, "fingerprint": "<sha256>"},
 "files": {"vae/config.json": {"repo": "...", "revision": "<commit>", "name": "config.json",
                               "bytes": 1234, "sha256": "..."}}}

conversion: only of folders that `convert` wrote; bytes and sha256 are those of the file here, repo
and revision those of the part that it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_sora import __version__
from mlx_sora.errors import WeightsError
from mlx_sora.utils.files import sha256
from mlx_sora.utils.json import read_object

FILE = "provenance.json"
FORMAT = 1

#: Characters of a path in a model folder.
MAX_NAME = 200

_FIX = "Move the folder away and get the model again."


@dataclass(frozen=True)
class FileOrigin:
    """One file: hub repository, commit, name in the repository, bytes and checksum."""

    repo: str
    revision: str
    name: str
    bytes: int
    sha256: str

    @property
    def is_valid(self) -> bool:
        """Whether every field is of its type, as in a file that we wrote."""
        texts = (self.repo, self.revision, self.name, self.sha256)
        return type(self.bytes) is int and all(isinstance(text, str) for text in texts)

    @property
    def folder(self) -> str:
        """Folder in the repository; "" is its root."""
        return "" if "/" not in self.name else self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Provenance:
    """Origin of every file of a model, by its path in the model folder.

    conversion: how it was made from another folder; empty for what came from a hub.
    """

    model: str
    endpoint: str
    files: Mapping[str, FileOrigin]
    conversion: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put it into `folder`."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "written_by": f"mlx_sora {__version__}",
            "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "endpoint": self.endpoint,
            **({"conversion": dict(self.conversion)} if self.conversion else {}),
            "files": {path: asdict(origin) for path, origin in sorted(self.files.items())},
        }
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Provenance | None:
        """That of a model folder, or None where there is none. Raises WeightsError if damaged."""
        path = folder / FILE
        try:
            content = read_object(path)
            files = {name: FileOrigin(**row) for name, row in content["files"].items()}
            model, endpoint = str(content["model"]), str(content["endpoint"])
            conversion = dict(content.get("conversion", {}))
            sound = not conversion or _is_valid_conversion(conversion)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WeightsError(f"Cannot read {path}: {error.strerror}.", "Check rights.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path} is damaged.", _FIX) from error
        if not sound:
            raise WeightsError(f"{path} is damaged: see its conversion.", _FIX)
        for name, origin in files.items():
            pure = PurePosixPath(name)
            outside = pure.is_absolute() or ".." in pure.parts or not pure.parts
            if outside or not name.isprintable() or len(name) > MAX_NAME or not origin.is_valid:
                raise WeightsError(f"{path} is damaged: see {name!r}.", _FIX)
        return cls(model, endpoint, files, conversion)

    def wrong_size(self, folder: Path) -> list[str]:
        """Paths whose file is absent from `folder` or has another size. Reads no content."""
        return [
            name for name, origin in self.files.items() if _file_size(folder / name) != origin.bytes
        ]

    def wrong_checksum(self, folder: Path, watch: Callable[[str, int, int], None]) -> list[str]:
        """Paths whose content is not the recorded one; reads every file that has the right size.

        watch: told path, bytes read and bytes in all.
        """
        wrong = self.wrong_size(folder)
        for name, origin in self.files.items():
            if name in wrong:
                continue

            def read(done: int, name: str = name, total: int = origin.bytes) -> None:
                watch(name, done, total)

            if sha256(folder / name, read) != origin.sha256:
                wrong.append(name)
        return sorted(wrong)


def _is_valid_conversion(conversion: Mapping[str, Any]) -> bool:
    """Whether it is what `convert` writes: the doctor puts it into a command to be typed."""
    how = conversion["quantization"]
    counts = isinstance(how, dict) and all(type(number) is int for number in how.values())
    return (
        isinstance(conversion["source"], str)
        and conversion["dtype"] in (None, "float32", "bfloat16")
        and (how is None or (counts and "bits" in how))
    )


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
