"""Step cache: when the blocks run, what replaces them, and that no block is read meanwhile."""

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

SCHEDULE = ScheduleInfo(steps=8, evaluations=1, frames=3)
SHAPE = (1, 3, 4, 2)


def cache(text: str, schedule: ScheduleInfo = SCHEDULE) -> ResidualCache:
    return ResidualCache(StepCache.parse(text), schedule)


@dataclass
class Stack:
    """Block stack that adds a known residual and records the steps in which it runs."""

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
        """Return the tokens after the blocks."""
        call = part.block_cache(step, rows or CFGSlice(0, len(x)))
        known = call.cached_residual(x, mx.full((len(x),), 1000.0 - step if t is None else t), mask)
        if known is not None:
            return x + known
        self.calls.append(step)
        out = x + added
        call.update(x, out)
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
def test_schedule_computes_warmup_and_every_nth_step(
    each: int, warmup: int, steps: int, computed: list[int]
) -> None:
    assert sorted(periodic_schedule(each, warmup, steps)) == computed
    part, stack = cache(f"every:{each},warmup={warmup}", replace(SCHEDULE, steps=steps)), Stack()
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


def test_order_zero_adds_the_last_residual() -> None:
    part, stack = cache("every:3,warmup=1"), Stack()
    stack.run(part, 0, ones(), 2.0)
    assert mx.array_equal(stack.run(part, 1, 5 * ones(), 9.0), 7 * ones())


def test_order_one_extrapolates_in_flow_time() -> None:
    part, stack = cache("every:3,warmup=2,order=1"), Stack()
    stack.run(part, 0, ones(), 8.0, t=1000.0)
    stack.run(part, 1, ones(), 6.0, t=900.0)
    out = stack.run(part, 2, ones(), 99.0, t=650.0)
    assert mx.allclose(out, (1 + 6 - 2 * 2.5) * ones())
    assert stack.calls == [0, 1]


def test_order_one_has_no_slope_within_one_time() -> None:
    part, stack = cache("every:3,warmup=2,order=1"), Stack()
    stack.run(part, 0, ones(), 8.0, t=900.0)
    stack.run(part, 1, ones(), 6.0, t=900.0)
    assert mx.array_equal(stack.run(part, 2, ones(), 99.0, t=650.0), 7 * ones())


def test_samples_have_their_own_residuals() -> None:
    part, stack = cache("every:2,warmup=1"), Stack()
    residuals = mx.array([1.0, 5.0]).reshape(2, 1, 1, 1)
    x = ones(2)
    call = part.block_cache(0, CFGSlice(0, 2))
    assert call.cached_residual(x, mx.array([9.0, 9.0]), None) is None
    call.update(x, x + residuals)
    assert mx.array_equal(stack.run(part, 1, x, 0.0), x + residuals)
    assert stack.calls == []


def test_sequential_guidance_shares_the_decision() -> None:
    part, stack = cache("every:2,warmup=1"), Stack()
    for step in range(4):
        for first, added in ((0, 1.0), (1, 5.0)):
            out = stack.run(part, step, ones(), added, rows=CFGSlice(first, 2))
            assert mx.array_equal(out, (1 + added) * ones())
    assert stack.calls == [0, 0, 2, 2]
    assert part.record()["evaluations"] == 4


def test_residuals_of_different_ages_are_not_mixed() -> None:
    """After a step without uncond, both predictions are computed, batched or not."""
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


def test_changed_frame_mask_runs_the_blocks() -> None:
    part, stack = cache("every:9,warmup=1"), Stack()
    held, moving = mx.array([[False, True, True]]), mx.array([[True, True, True]])
    for step, mask in enumerate((held, held, moving, moving, None, None)):
        stack.run(part, step, ones(), 1.0, mask=mask)
    assert stack.calls == [0, 2, 4]


@pytest.mark.parametrize("text", ["every:1", "every:3,warmup=8"])
def test_schedule_that_saves_nothing_warns(text: str) -> None:
    assert "saves nothing in 8 steps" in cache(text).warnings[0]
    assert cache("every:2").warnings == ()


def moves(sizes: Sequence[float], threshold: float, warmup: int = 2) -> list[int]:
    """Return the steps that OnlineRule computes for tokens of `sizes`, which the blocks triple."""
    rule, computed = OnlineRule(threshold, warmup, len(sizes)), []
    for step, size in enumerate(sizes):
        x = size * ones()
        if not rule.should_reuse(step, x):
            rule.update(x, 3 * x)
            computed.append(step)
    return computed


def test_online_rule_estimates_the_change_of_the_output() -> None:
    """The ratio is 3, an output is 3 · 10: a step of 0.5 is estimated as 3 · 0.5 / 30 of it."""
    sizes = [10 + 0.5 * i for i in range(12)]
    assert moves(sizes, 0.0) == [*range(12)]
    assert moves(sizes, 1.0) == [0, 1, 11]
    # 0.5 / 10.5 a step: the third reaches 0.14; then 0.5 / 12, so that it takes four.
    assert moves(sizes, 0.14) == [0, 1, 4, 8, 11]
    assert moves(sizes, 0.14, warmup=4) == [0, 1, 2, 3, 7, 11]


def test_online_rule_accepts_tokens_that_do_not_change() -> None:
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
def test_cached_residuals_are_counted(text: str, guided: bool, tensors: float) -> None:
    text = text.replace("online,", "online:")
    assert cache(text, replace(SCHEDULE, guided=guided)).cached_residuals == tensors


# On a network.


def path(network: STDiT3, part: ResidualCache | None, blocks: object = None) -> list[mx.array]:
    """Return the predictions of a few steps, each from the one before."""
    config = network.config
    z = mx.random.normal((1, *networks.GRID, config.in_channels), key=mx.random.key(4))
    text = mx.random.normal((8, config.caption_channels), key=mx.random.key(5))
    conditions = network.prepare([text], networks.GRID, height=40, width=48, fps=24)
    found = []
    for step in range(SCHEDULE.steps):
        stack = None if part is None else part.block_cache(step, CFGSlice(0, 1))
        t = mx.array([1000.0 - 100 * step])
        out = network(z, t, conditions, None, Hooks(blocks, block_cache=stack))  # type: ignore[arg-type]
        mx.eval(out)
        found.append(out)
        z = z + 0.1 * out[..., : config.in_channels]
    return found


def test_cache_that_computes_every_step_is_exact(model: ModelFolder) -> None:
    network = load_transformer(model, mx.float32)
    plain = path(network, None)
    for text in ("every:1", "every:1,order=1", "online:threshold=0"):
        assert all(map(mx.array_equal, path(network, cache(text)), plain)), text


def test_cache_changes_nothing_before_the_first_reuse(model: ModelFolder) -> None:
    network = load_transformer(model, mx.float32)
    plain, cached = path(network, None), path(network, cache("every:3,warmup=2"))
    same = [bool(mx.array_equal(a, b)) for a, b in zip(plain, cached, strict=True)]
    assert same == [True, True, *[False] * 6]
    # The time of a cached step still counts: its prediction is not the last one again.
    assert not mx.array_equal(cached[2], cached[1])


def test_cached_step_reads_no_block(model: ModelFolder) -> None:
    whole = path(load_transformer(model, mx.float32), cache("every:3,warmup=2"))
    network, source = stream_transformer(model, mx.float32)
    with BlockStream(source, cyclic=True) as blocks:
        found = path(network, cache("every:3,warmup=2"), blocks)
        assert blocks.stats.loads == 4 * networks.STDIT.depth
        assert blocks.stats.nbytes == 4 * sum(source.disk_bytes)
    assert all(map(mx.array_equal, whole, found))
