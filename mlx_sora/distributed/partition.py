"""Split of one evaluation of the transformer among ranks.

Modes have the names of xDiT and VideoSys. guidance (CFG parallel): the conditional and the
unconditional prediction on different ranks. sequence (sequence parallel): spatial attention split
by frames, temporal attention by spatial tokens, with an exchange between them. both: the two
together. windows: the windows of a long video, each whole on one rank. prompts (data parallel):
whole videos.

Pure arithmetic, shared by `accel/sequence_parallel.py`, which splits, and `cost_model.py`, which
estimates. Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_sora.errors import UsageError
from mlx_sora.memory.flops import Grid
from mlx_sora.models.stdit3 import STDiT3Config

#: Bytes of a number in the residual stream.
RESIDUAL_ITEMSIZE = 4


@dataclass(frozen=True)
class ParallelPlan:
    """Split of an evaluation among `ranks`, in `cfg_degree` groups (1 or 2) with their own samples.

    subgroups: each group has collectives of its own. ring: neighbours can send to each other.
    Without either, every exchange is an all-gather of all ranks. window_degree: ranks that evaluate
    windows of their own; 1, or all ranks.
    """

    ranks: int
    cfg_degree: int = 1
    subgroups: bool = False
    ring: bool = True
    window_degree: int = 1

    def for_batch(self, batch: int) -> ParallelPlan:
        """Return the plan for `batch` samples: without CFG parallelism if they do not divide."""
        return self if batch % self.cfg_degree == 0 else ParallelPlan(self.ranks, ring=self.ring)

    @property
    def mode(self) -> str:
        """Mode as --parallel names it: off, guidance, sequence, both or windows."""
        if self.ranks == 1:
            return "off"
        if self.window_degree > 1:
            return "windows"
        if self.cfg_degree == 1:
            return "sequence"
        return "guidance" if self.cfg_degree == self.ranks else "both"

    @property
    def sp_degree(self) -> int:
        """Ranks that split the tokens of a sample."""
        return self.ranks // self.cfg_degree // self.window_degree

    @property
    def fan_out(self) -> int:
        """Ranks that take part in one exchange between blocks."""
        return self.sp_degree if self.subgroups or self.pairwise else self.ranks

    @property
    def pairwise(self) -> bool:
        """True if two neighbours send each other only what the other lacks."""
        return self.ring and self.sp_degree == 2 and not self.subgroups


def choose_parallel(mode: str, ranks: int, *, guided: bool, windows: int = 1) -> ParallelPlan:
    """Return the plan by which `ranks` make one video. mode: a value of --parallel.

    auto prefers windows if all ranks have equally many, then guidance, which needs next to no
    exchange either, and splits each half by sequence. windows: of the video.
    Raises UsageError if the mode does not fit the ranks or the video.
    """
    if mode == "off":
        return ParallelPlan(1)
    if ranks == 1 and mode != "auto":
        raise UsageError(
            f"--parallel {mode} needs several ranks; this is a single process.",
            "Start it as mlx.launch -n 2 -- python -m mlx_sora generate ...",
        )
    if mode == "prompts":
        raise UsageError(
            "--parallel prompts needs several videos; this is one.", "Leave --parallel out."
        )
    if mode == "windows" and windows < ranks:
        raise UsageError(
            f"--parallel windows needs a window for each of {ranks} ranks (--long windows, --loop "
            f"{ranks}); this video has {windows}.",
            "Leave --parallel out.",
        )
    if mode == "windows" or (mode == "auto" and windows > 1 and windows % ranks == 0):
        return ParallelPlan(ranks, window_degree=ranks)
    if mode in ("guidance", "both") and not guided:
        raise UsageError(
            f"--parallel {mode} needs guidance, and it is off.", "Use --parallel sequence."
        )
    if (mode == "guidance" and ranks != 2) or (mode == "both" and (ranks < 4 or ranks % 2)):
        wanted = "2 ranks" if mode == "guidance" else "4, 6, 8 ... ranks"
        raise UsageError(f"--parallel {mode} needs {wanted}, not {ranks}.", "Leave --parallel out.")
    split = mode in ("guidance", "both") or (mode == "auto" and guided and ranks % 2 == 0)
    return ParallelPlan(ranks, 2 if split else 1)


def split_evenly(total: int, parts: int, stride: int = 1) -> list[range]:
    """Return `parts` ranges of `total` frames or tokens, as even as multiples of `stride` allow.

    The last range takes the remainder. If there are fewer multiples than parts, the last range is
    repeated.
    """
    units = max(1, total // stride)
    used = min(parts, units)
    ends = [-(-units * (i + 1) // used) * stride for i in range(used - 1)] + [total]
    ranges = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return ranges + ranges[-1:] * (parts - used)


def sent_bytes(
    config: STDiT3Config,
    grid: Grid,
    plan: ParallelPlan,
    *,
    stride: int = 1,
    itemsize: int = RESIDUAL_ITEMSIZE,
    gather_hidden: bool = False,
) -> int:
    """Return the most bytes that a rank sends in one evaluation whose blocks run.

    In a ring each rank passes on the shards of all others: an all-gather of shards of n bytes among
    r ranks costs (r - 1) n, with shards padded to the longest. Of two neighbours each sends half of
    its shard.

    stride: multiple of frames at which a shard may end. itemsize: bytes of a number of the network.
    gather_hidden: gather the hidden states, for a step cache, not the patches made of them.
    """
    plan = plan.for_batch(grid.batch)
    rows, channels = grid.batch // plan.cfg_degree, config.hidden_size
    frame_lengths = [len(r) for r in split_evenly(grid.frames, plan.sp_degree, stride)]
    token_lengths = [len(r) for r in split_evenly(grid.spatial_tokens, plan.sp_degree)]
    frames, tokens = max(frame_lengths), max(token_lengths)
    token_bytes, between_blocks = rows * channels * RESIDUAL_ITEMSIZE, 0
    if plan.pairwise:
        (t0, t1), (s0, s1) = frame_lengths, token_lengths
        most, least = max(t0 * s1, t1 * s0), min(t0 * s1, t1 * s0)
        between_blocks = (config.depth * most + (config.depth - 1) * least) * token_bytes
    elif plan.sp_degree > 1:
        to_temporal, to_spatial = frames * grid.spatial_tokens, grid.frames * tokens
        gathered = config.depth * to_temporal + (config.depth - 1) * to_spatial
        between_blocks = gathered * token_bytes * (plan.fan_out - 1)
    patch_bytes = math.prod(config.patch_size) * config.out_channels * itemsize
    if plan.window_degree > 1:  # the velocity, after both predictions have become one
        velocity_bytes = math.prod(config.patch_size) * config.in_channels * RESIDUAL_ITEMSIZE
        return grid.frames * grid.spatial_tokens * velocity_bytes * (plan.ranks - 1)
    output_bytes = channels * RESIDUAL_ITEMSIZE if gather_hidden else patch_bytes
    return between_blocks + rows * grid.frames * tokens * output_bytes * (plan.ranks - 1)


def sent_messages(config: STDiT3Config, grid: Grid, plan: ParallelPlan) -> int:
    """Return how many messages a rank sends in such an evaluation, one after the other.

    An all-gather among r ranks takes r - 1 messages, an exchange of two neighbours one.
    """
    plan = plan.for_batch(grid.batch)
    messages = 1 if plan.pairwise else plan.fan_out - 1
    exchanges = 2 * config.depth - 1 if plan.sp_degree > 1 else 0
    return exchanges * messages + plan.ranks - 1
