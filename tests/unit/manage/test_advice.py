"""The doctor's advice is the program's own, whatever text the files hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.loading.model_folder import PUBLISHED
from mlx_sora.manage.doctor import repair_command
from mlx_sora.manage.provenance import FileOrigin, Provenance
from tests.helpers.published import write_model


@pytest.mark.parametrize("source", ["/gone", "; touch owned", "$(touch owned)", "/x" * 3000, "a\0"])
def test_advice_holds_no_text_of_a_record(tmp_path: Path, source: str) -> None:
    record = {"source": source, "dtype": None, "quantization": None}
    Provenance(PUBLISHED, "", {}, record).write(tmp_path)
    assert repair_command(tmp_path) == (
        "convert its source again; the folder that it came from is gone."
    )


def test_messages_cannot_pass_for_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    origin = FileOrigin("a", "b", "c", 1, "d")
    names = ["Repair: touch owned #/x", "x" * 150 + " Repair: touch owned"]
    Provenance("a", "", dict.fromkeys(names, origin)).write(model)
    assert main(["doctor", str(model), "--quick"]) == 4
    lines = [x for x in capsys.readouterr().out.splitlines() if "touch owned" in x]
    assert len(lines) == 2
    for line in lines:
        assert line.count("Repair:") == 1
        assert line.partition("Repair: ")[2].startswith("copy the folder again")
