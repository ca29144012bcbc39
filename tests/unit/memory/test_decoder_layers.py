"""Plans of a temporal decoder whose layers are streamed."""

from __future__ import annotations

from dataclasses import replace

from mlx_sora.memory.plan import WeightSizes
from mlx_sora.memory.planner import make_plan
from tests.unit.memory.test_planner import CPU, MB, XL, workload

#: XL with its temporal decoder in layers, and few bits in the other networks.
SMALL = replace(
    XL,
    text_weights=WeightSizes((109 * MB,) * 24, 109 * MB, 0, 24 * 109 * MB, 0),
    transformer_weights=WeightSizes((27 * MB,) * 28, 27 * MB, 74 * MB, 28 * 24 * MB, 37 * MB),
    vae_decoder=replace(
        XL.vae_decoder,
        layers=WeightSizes((57 * MB,) * 9 + (11 * MB,) * 13, 114 * MB, 5 * MB, 656 * MB, 5 * MB),
    ),
)


def test_the_temporal_decoder_is_streamed_where_it_does_not_fit() -> None:
    small, whole = workload(256, 144), replace(SMALL, vae_decoder=XL.vae_decoder)
    least, fewest = (make_plan(sizes, small, CPU).smallest for sizes in (whole, SMALL))
    assert fewest < least - 250 * MB
    plans = [make_plan(sizes, small, CPU, least) for sizes in (whole, SMALL)]
    assert plans[0].stages == plans[1].stages
    before = None
    for budget in range(fewest, least, 20 * MB):
        stage = make_plan(SMALL, small, CPU, budget).stage("decode")
        assert stage.peak <= budget
        assert (stage.blocks, stage.sequential_offload) == (22, True)
        if before is not None:
            assert before.resident <= stage.resident < 22
            assert before.read >= stage.read
        before = stage
    assert before is not None
    assert before.resident > 12
    image = make_plan(SMALL, workload(256, 144, 1), CPU, least - 250 * MB).stage("decode")
    assert (image.resident, image.read) == (0, 859 * MB)  # each layer once: none would be reused
