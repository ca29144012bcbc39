"""What a model folder says of itself without a weight being read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.doctor import Examination
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.provenance import Provenance
from mlx_sora.loading.quantize import Quantization, count_parameters

#: Bytes of each tensor that a fingerprint looks at.
_SAMPLE = 64


def quantization_record(model: ModelFolder) -> dict[str, Any]:
    """For a video's metadata: {"quantization": {part: bits and group size}}, or {} without any.

    Raises WeightsError for a config.json that cannot be read.
    """
    found = {part: Quantization.read(model.config(part)) for part in PARTS}
    if model.bits is not None:
        found |= dict.fromkeys(("text_encoder", "transformer"), Quantization(model.bits))
    parts = {part: kind.to_dict() for part, kind in found.items() if kind is not None}
    return {"quantization": parts} if parts else {}


def fingerprint(model: ModelFolder) -> str:
    """Checksum of what tells models apart: configurations, and of every tensor its name, shape,
    type and the bytes in its middle. Reads a few kilobytes in all.

    Raises WeightsError for files that cannot be opened.
    """
    found = hashlib.sha256()
    for part in PARTS:
        found.update(json.dumps([part, model.config(part)], sort_keys=True).encode())
        tensors = Checkpoint.open(model.path / part).tensors
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            found.update(f"\n{name} {info.dtype} {info.shape}\n".encode())
            with info.file.open("rb") as file:
                file.seek(info.offset + info.nbytes // 2)
                found.update(file.read(min(_SAMPLE, info.nbytes - info.nbytes // 2)))
    return found.hexdigest()


def describe_model(model: ModelFolder) -> dict[str, Any]:
    """Parts with parameters, bytes, types and quantisation; origin; what the doctor finds at once.

    Plain JSON values. Raises WeightsError for files that cannot be opened.
    """
    parts = {part: _describe_part(model, part) for part in PARTS}
    facts: dict[str, Any] = {
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
    }
    facts |= _origin(model)
    checks: dict[str, list[str]] = {}
    for finding in Examination(model.path, quick=True).findings():
        mark = "" if finding.level == "ok" else f"{finding.level}: "
        checks.setdefault(finding.subject, []).append(mark + finding.message)
    return facts | {"checks": {subject: " ".join(texts) for subject, texts in checks.items()}}


def _describe_part(model: ModelFolder, part: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(model.path / part)
    quantization = Quantization.read(model.config(part))
    types = Counter(info.dtype for info in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "parameters": count_parameters(checkpoint, quantization),
        "bytes": checkpoint.nbytes,
        "types": ", ".join(f"{count} {dtype}" for dtype, count in types.most_common()),
        "files": len({info.file for info in checkpoint.tensors.values()}),
    }
    if quantization is not None:
        facts["quantization"] = str(quantization)
    return facts


def _origin(model: ModelFolder) -> dict[str, Any]:
    """Repositories and revisions of the files, and how they were converted, where that is known."""
    try:
        known = Provenance.read(model.path)
    except WeightsError:  # which the doctor tells
        return {}
    if known is None:
        return {}
    places = {
        path.split("/")[0]: origin.repo + (f"@{origin.revision}" if origin.revision else "")
        for path, origin in known.files.items()
        if "/" in path
    }
    facts: dict[str, Any] = {"origin": places}
    if known.conversion:
        facts["converted_from"] = known.conversion["source"]
    return facts
