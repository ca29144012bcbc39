"""The step cache: when the blocks run, what stands for them, and that streaming reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import pytest

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.step_cache import OnlineRule, ResidualCache, periodic_schedule
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_transformer, stream_transformer
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import STDiT3
from mlx_sora.request.techniques import StepCache
from mlx_sora.sampling.guidance import CFGSlice
from tests.helpers import networks

JOB = ScheduleInfo(steps=8, evaluations=1, frames=3)
SHAPE = (1, 3, 4, 2)


def cache(text: str, job: ScheduleInfo = JOB) -> ResidualCache:
    return ResidualCache(StepCache.parse(text), job)


@dataclass
class Stack:
    """Blocks that add a known sum; counts how often they run."""

    calls: list[int] = field(default_factory=list)

    def run(
        self,
        part: ResidualCache,
        step: int,
        x: mx.array,
        added: float,
        *,
        t: float | None = None,
        rows: CFGSlice | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        """What the network has after its blocks."""
        seam = part.block_cache(step, rows or CFGSlice(0, len(x)))
        known = seam.cached_residual(x, mx.full((len(x),), 1000.0 - step if t is None else t), mask)
        if known is not None:
            return x + known
        self.calls.append(step)
        out = x + added
        seam.update(x, out)
        return out


def ones(batch: int = 1) -> mx.array:
    return mx.ones((batch, *SHAPE[1:]))


@pytest.mark.parametrize(
    ("each", "warmup", "steps", "computed"),
    [
        (4, 6, 30, [*range(6), 9, 13, 17, 21, 25, 29]),
        (3, 6, 30, [*range(6), 8, 11, 14, 17, 20, 23, 26, 29]),
        (2, 1, 5, [0, 2, 4]),
        (1, 1, 4, [0, 1, 2, 3]),
        (9, 6, 4, [0, 1, 2, 3]),
    ],
)
def test_the_schedule_is_as_printed(
    each: int, warmup: int, steps: int, computed: list[int]
) -> None:
    assert sorted(periodic_schedule(each, warmup, steps)) == computed
    part, stack = cache(f"every:{each},warmup={warmup}", replace(JOB, steps=steps)), Stack()
    for step in range(steps):
        stack.run(part, step, ones(), 1.0)
    assert stack.calls == computed
    assert part.record() == {
        "computed": computed,
        "evaluations": steps,
        "evaluations_saved": steps - len(computed),
    }
    assert sorted(part.skipped_steps) == [i for i in range(steps) if i not in computed]
    assert part.summary() == (
        f"step_cache: the blocks ran in {len(computed)} of {steps} evaluations; "
        f"{steps - len(computed)} saved"
    )


def test_the_last_sum_is_added_to_the_new_tokens() -> None:
    part, stack = cache("every:3,warmup=1"), Stack()
    stack.run(part, 0, ones(), 2.0)
    assert mx.array_equal(stack.run(part, 1, 5 * ones(), 9.0), 7 * ones())


def test_order_one_follows_the_line_in_flow_time() -> None:
    part, stack = cache("every:3,warmup=2,order=1"), Stack()
    stack.run(part, 0, ones(), 8.0, t=1000.0)
    stack.run(part, 1, ones(), 6.0, t=900.0)
    out = stack.run(part, 2, ones(), 99.0, t=650.0)
    assert mx.allclose(out, (1 + 6 - 2 * 2.5) * ones())
    assert stack.calls == [0, 1]


def test_two_evaluations_at_one_time_have_no_slope() -> None:
    part, stack = cache("every:3,warmup=2,order=1"), Stack()
    stack.run(part, 0, ones(), 8.0, t=900.0)
    stack.run(part, 1, ones(), 6.0, t=900.0)
    assert mx.array_equal(stack.run(part, 2, ones(), 99.0, t=650.0), 7 * ones())


def test_every_sample_has_its_own_sum() -> None:
    part, stack = cache("every:2,warmup=1"), Stack()
    sums = mx.array([1.0, 5.0]).reshape(2, 1, 1, 1)
    x = ones(2)
    seam = part.block_cache(0, CFGSlice(0, 2))
    assert seam.cached_residual(x, mx.array([9.0, 9.0]), None) is None
    seam.update(x, x + sums)
    assert mx.array_equal(stack.run(part, 1, x, 0.0), x + sums)
    assert stack.calls == []


def test_halves_in_two_calls_share_the_decision() -> None:
    part, stack = cache("every:2,warmup=1"), Stack()
    for step in range(4):
        for first, added in ((0, 1.0), (1, 5.0)):
            out = stack.run(part, step, ones(), added, rows=CFGSlice(first, 2))
            assert mx.array_equal(out, (1 + added) * ones())
    assert stack.calls == [0, 0, 2, 2]
    assert part.record()["evaluations"] == 4


def test_sums_of_different_ages_are_not_mixed() -> None:
    """The half without prompt was not run last time: both are run now, batched or not."""
    for split in (True, False):
        part, stack = cache("every:9,warmup=2"), Stack()
        stack.run(part, 0, ones(2), 1.0)
        stack.run(part, 1, ones(), 2.0)  # with prompt alone
        assert mx.array_equal(stack.run(part, 2, ones(), 9.0), 3 * ones())
        if split:
            for first in (0, 1):
                stack.run(part, 3, ones(), 4.0, rows=CFGSlice(first, 2))
        else:
            stack.run(part, 3, ones(2), 4.0)
        assert set(stack.calls) == {0, 1, 3}
        assert mx.array_equal(stack.run(part, 4, ones(2), 9.0), 5 * ones(2))


def test_frames_that_begin_to_move_have_the_blocks_run() -> None:
    part, stack = cache("every:9,warmup=1"), Stack()
    held, moving = mx.array([[False, True, True]]), mx.array([[True, True, True]])
    for step, mask in enumerate((held, held, moving, moving, None, None)):
        stack.run(part, step, ones(), 1.0, mask=mask)
    assert stack.calls == [0, 2, 4]


@pytest.mark.parametrize("text", ["every:1", "every:3,warmup=8"])
def test_what_saves_nothing_is_said(text: str) -> None:
    assert "saves nothing in 8 steps" in cache(text).warnings[0]
    assert cache("every:2").warnings == ()


def moves(sizes: Sequence[float], threshold: float, warmup: int = 2) -> list[int]:
    """Steps that Online computes, where tokens are at `sizes` and blocks triple them."""
    rule, computed = OnlineRule(threshold, warmup, len(sizes)), []
    for step, size in enumerate(sizes):
        x = size * ones()
        if not rule.should_reuse(step, x):
            rule.update(x, 3 * x)
            computed.append(step)
    return computed


def test_online_foresees_the_change_of_the_outcome() -> None:
    """The ratio is 3, an outcome is 3 · 10: each step of 0.5 foresees 3 · 0.5 / 30 of it."""
    sizes = [10 + 0.5 * i for i in range(12)]
    assert moves(sizes, 0.0) == [*range(12)]
    assert moves(sizes, 1.0) == [0, 1, 11]
    # 0.5 / 10.5 a step: the third reaches 0.14; then 0.5 / 12, so that it takes four.
    assert moves(sizes, 0.14) == [0, 1, 4, 8, 11]
    assert moves(sizes, 0.14, warmup=4) == [0, 1, 2, 3, 7, 11]


def test_online_copes_with_tokens_that_stand_still() -> None:
    assert moves([2.0] * 6, 0.1) == [0, 1, 2, 3, 4, 5]
    assert moves([0.0] * 6, 0.1) == [0, 1, 2, 3, 4, 5]
    assert moves([1.0, 2.0, 2.0, 2.0, 2.0, 2.0], 0.1) == [0, 1, 5]


@pytest.mark.parametrize(
    ("text", "guided", "tensors"),
    [
        ("every:2", True, 1),
        ("every:2,order=1", True, 2),
        ("online", True, 2.5),
        ("online,order=1", False, 5),
    ],
)
def test_tensors_that_are_kept(text: str, guided: bool, tensors: float) -> None:
    text = text.replace("online,", "online:")
    assert cache(text, replace(JOB, guided=guided)).cached_residuals == tensors


# On a network.


def path(network: STDiT3, part: ResidualCache | None, blocks: object = None) -> list[mx.array]:
    """Predictions of a few steps, each on the one before."""
    config = network.config
    z = mx.random.normal((1, *networks.GRID, config.in_channels), key=mx.random.key(4))
    text = mx.random.normal((8, config.caption_channels), key=mx.random.key(5))
    conditions = network.prepare([text], networks.GRID, height=40, width=48, fps=24)
    found = []
    for step in range(JOB.steps):
        stack = None if part is None else part.block_cache(step, CFGSlice(0, 1))
        t = mx.array([1000.0 - 100 * step])
        out = network(z, t, conditions, None, Hooks(blocks, block_cache=stack))  # type: ignore[arg-type]
        mx.eval(out)
        found.append(out)
        z = z + 0.1 * out[..., : config.in_channels]
    return found


def test_computing_every_step_is_exact_bit_for_bit(model: ModelFolder) -> None:
    network = load_transformer(model, mx.float32)
    plain = path(network, None)
    for text in ("every:1", "every:1,order=1", "online:threshold=0"):
        assert all(map(mx.array_equal, path(network, cache(text)), plain)), text


def test_up_to_the_first_reuse_nothing_changes_and_then_it_does(model: ModelFolder) -> None:
    network = load_transformer(model, mx.float32)
    plain, cached = path(network, None), path(network, cache("every:3,warmup=2"))
    same = [bool(mx.array_equal(a, b)) for a, b in zip(plain, cached, strict=True)]
    assert same == [True, True, *[False] * 6]
    # The time of a cached step still counts: its prediction is not the last one again.
    assert not mx.array_equal(cached[2], cached[1])


def test_a_cached_step_reads_no_block(model: ModelFolder) -> None:
    whole = path(load_transformer(model, mx.float32), cache("every:3,warmup=2"))
    network, source = stream_transformer(model, mx.float32)
    with BlockStream(source, cyclic=True) as blocks:
        found = path(network, cache("every:3,warmup=2"), blocks)
        assert blocks.stats.loads == 4 * networks.STDIT.depth
        assert blocks.stats.nbytes == 4 * sum(source.disk_bytes)
    assert all(map(mx.array_equal, whole, found))
