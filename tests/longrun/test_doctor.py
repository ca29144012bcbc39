"""What the doctor finds: a hundred changes of models that show in a video, and harmless ones.

Alone, with a table of every case: `python -m pytest -m longrun tests/longrun/test_doctor.py -s`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_sora import MlxSoraError, Pipeline
from mlx_sora.manage.doctor import ModelChecker
from mlx_sora.manage.records import Diagnostic
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import Finished, PreviewReady
from tests.helpers import harmless, mutations
from tests.longrun.table import Fault

REQUEST: dict[str, Any] = {"seed": 5, "num_frames": 17}
PROMPT = "a red circle moving right on a black background"

#: Found of the cases that show, at least.
SHARE = 57 / 60


def frames(model: Path, options: dict[str, Any]) -> np.ndarray | None:
    """Frames of a video, or of its previews; None if it is refused."""
    request = GenerationRequest.from_dict({"prompt": PROMPT, **REQUEST, **options})
    shown = []
    try:
        for event in Pipeline.from_pretrained(model).stream(request):
            if isinstance(event, PreviewReady):
                shown.append(event.frames)
            if isinstance(event, Finished) and not shown:
                shown.append(event.video.frames)
    except MlxSoraError:
        return None
    return np.concatenate(shown)


def largest_change(before: np.ndarray, after: np.ndarray | None) -> float:
    if after is None or before.shape != after.shape:
        return 255.0
    return float(np.abs(before.astype(int) - after.astype(int)).max())


def faults(model: Path) -> list[Diagnostic]:
    """Warnings and errors about a model."""
    return [d for d in ModelChecker(model, quick=False).run() if d.level in ("warning", "error")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: mutations.write_folder(kind, root / kind) for kind in mutations.FOLDERS}


def test_what_shows_is_found(folders: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    originals: dict[str, np.ndarray] = {}
    showing, missed = 0, []
    for number, (mutation, kind, records) in enumerate(mutations.cases()):
        model = Path(shutil.copytree(folders[kind], tmp_path / str(number) / "model"))
        mutation.change(model, np.random.default_rng(number))
        key = f"{kind} {mutation.options}"
        if key not in originals:
            made = frames(folders[kind], mutation.options)
            assert made is not None
            originals[key] = made
        change = largest_change(originals[key], frames(model, mutation.options))
        mutations.tamper_records(model, records)
        found = faults(model)
        said = found[0].message if found else "NOTHING"
        line = f"{mutation.name:20}{kind:10}{records:10}{change:4.0f}  {said[:150]}"
        sys.stdout.write(line + "\n")
        shutil.rmtree(model)
        if change > 1:
            showing += 1
            missed += [] if found else [line]
    assert showing >= 60
    fault("changes of a model that show", "doctor", showing, len(missed), "found")
    assert len(missed) <= showing * (1 - SHARE), missed


def test_what_is_harmless_is_no_fault(
    folders: dict[str, Path], tmp_path: Path, fault: Fault
) -> None:
    called, count = [], 0
    for name, kind, records in harmless.harmless_cases():
        place = tmp_path / str(count)
        model = Path(shutil.copytree(folders[kind], place / "model"))
        mutations.tamper_records(model, records)
        found = faults(harmless.HARMLESS[name](model))
        sys.stdout.write(f"{name:20}{kind:10}{records:10}{[d.message for d in found]}\n")
        called += [f"{name}, {kind}, {records}: {d.message}" for d in found]
        shutil.rmtree(place)
        count += 1
    assert count >= 60
    fault("harmless changes of a model", "doctor", count, len(called), "not called faults")
    assert called == []
