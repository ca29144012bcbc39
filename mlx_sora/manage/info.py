"""Facts about a model folder, without reading its weights."""

from __future__ import annotations

from typing import Any

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.quantization import NetworkQuantization
from mlx_sora.manage.doctor import ModelChecker, describe_part
from mlx_sora.manage.provenance import Provenance


def describe_model(model: ModelFolder) -> dict[str, Any]:
    """Return parts, totals, origin and the results of the doctor's quick checks, as JSON values.

    Raises WeightsError for files that cannot be opened.
    """
    parts = {
        part: describe_part(
            Checkpoint.open(model.path / part), NetworkQuantization.from_config(model.config(part))
        )
        for part in PARTS
    }
    facts: dict[str, Any] = {
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
    }
    facts |= _origin(model)
    checks: dict[str, list[str]] = {}
    for result in ModelChecker(model.path, quick=True).run():
        level = "" if result.level == "ok" else f"{result.level}: "
        checks.setdefault(result.subject, []).append(level + result.message)
    return facts | {"checks": {subject: " ".join(texts) for subject, texts in checks.items()}}


def _origin(model: ModelFolder) -> dict[str, Any]:
    """Return repositories and revisions of the parts, source and calibration of a conversion."""
    try:
        provenance = Provenance.read(model.path)
    except WeightsError:  # the doctor reports it
        return {}
    if provenance is None:
        return {}
    places = {
        path.split("/")[0]: origin.repo + (f"@{origin.revision}" if origin.revision else "")
        for path, origin in provenance.files.items()
        if "/" in path
    }
    facts: dict[str, Any] = {"origin": places}
    if provenance.conversion:
        facts["converted_from"] = provenance.conversion["source"]
    if gptq := provenance.conversion.get("gptq"):
        facts["gptq"] = {**gptq, "prompts": len(gptq["prompts"])}
    return facts
