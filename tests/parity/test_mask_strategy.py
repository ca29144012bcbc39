"""References put into latents by mask strategies, against the reference: exact."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.conditioning.mask_strategy import (
    apply_mask_strategy,
    parse_mask_strategy,
    resolve_mask_strategy,
)
from mlx_sora.errors import UsageError
from tests.helpers.golden import Case, channels_last


def sample(case: Case, index: int, number: int) -> tuple[mx.array, list[mx.array]]:
    """Latents and references of sample `number` of a case, channels last, each a batch of one."""
    z = channels_last(case[f"in.{index}.z"])[number : number + 1]
    names = [name for name in case.tensors if name.startswith(f"in.{index}.ref.{number}.")]
    return z, [channels_last(case[name][None]) for name in sorted(names)]


@pytest.mark.golden("mask_strategy")
def test_mask_strategies(case: Case) -> None:
    for row in case.config["cases"]:
        index, refused = row["index"], 0
        for number, strategy in enumerate(row["mask_strategy"]):
            z, references = sample(case, index, number)
            lengths = [reference.shape[1] for reference in references]
            try:
                spans = resolve_mask_strategy(
                    parse_mask_strategy(strategy), row["loop_i"], lengths, z.shape[1], row["align"]
                )
            except UsageError:
                refused += 1
                continue
            placed, mask = apply_mask_strategy(z, references, spans)
            if row["error"] is None:
                expected = channels_last(case[f"out.{index}.z"])[number : number + 1]
                assert mx.array_equal(placed, expected), row
                assert mx.array_equal(mask[0], case[f"out.{index}.mask"][number]), row
        assert bool(refused) == (row["error"] is not None), row
