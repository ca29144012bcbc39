"""What a model folder says of itself without a weight being read."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.quantization import Quantization, count_parameters
from mlx_sora.manage.doctor import ModelChecker
from mlx_sora.manage.provenance import Provenance


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
    for finding in ModelChecker(model.path, quick=True).run():
        mark = "" if finding.level == "ok" else f"{finding.level}: "
        checks.setdefault(finding.subject, []).append(mark + finding.message)
    return facts | {"checks": {subject: " ".join(texts) for subject, texts in checks.items()}}


def _describe_part(model: ModelFolder, part: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(model.path / part)
    quantization = Quantization.from_config(model.config(part))
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
