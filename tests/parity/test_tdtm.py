"""Token merging against On-device Sora's STDiT3: the whole pass, and every block's output."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.models.hooks import Hooks
from tests.helpers.golden import Case, channels_first, channels_last, relative_error
from tests.helpers.tolerance import rounding
from tests.parity.test_stdit3 import Recorder, load, prepare

TOLERANCE = rounding(1e-4)


def run(case: Case, context: Hooks | None) -> dict[str, mx.array]:
    """The case's pass: `output`, and blocks as spatial.i and temporal.i, in its token order."""
    model, seen = load(case), dict[str, mx.array]()
    conditions = prepare(model, case)
    for kind in ("spatial", "temporal"):
        blocks = getattr(model, f"{kind}_blocks")
        for i, block in enumerate(blocks):
            blocks[i] = Recorder(block, f"{kind}.{i}", seen)
    z, t = channels_last(case["in.x"]), case["in.timestep"]
    out = model(z, t, conditions, case.get("in.x_mask"), context)
    named = {name: x.reshape(x.shape[0], -1, x.shape[-1]) for name, x in seen.items()}
    return named | {"output": channels_first(out)}


@pytest.mark.golden("tdtm")
def test_merged(case: Case) -> None:
    seen, plain = run(case, Hooks(token_merging=PairedFrames())), run(case, None)
    expected = {name: x for name, x in case.tensors.items() if name.startswith("out.merged")}
    assert expected
    for name, x in expected.items():
        key = name.removeprefix("out.merged").removeprefix(".") or "output"
        assert relative_error(seen[key], x) <= TOLERANCE, name
        # The case would not tell the two apart otherwise.
        assert relative_error(plain[key], x) > 1e-2, name


@pytest.mark.golden("tdtm")
def test_plain(case: Case) -> None:
    if "out.plain" not in case.tensors:
        pytest.skip("the case holds no pass without merging")
    assert relative_error(run(case, None)["output"], case["out.plain"]) <= TOLERANCE
