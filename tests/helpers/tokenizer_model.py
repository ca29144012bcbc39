"""Where the tests find T5's tokenizer model."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "weights" / "shapes" / "tokenizer" / "spiece.model"


def spiece_model(golden: Path) -> Path:
    """The bundled model's, or the one that lies beside the golden folder."""
    return BUNDLED if BUNDLED.exists() else golden.parent / "tokenizer" / "spiece.model"
