"""CI-DL, concurrent inference with dynamic loading: read block i + 1 while block i computes.

Mirrors On-device Sora: one thread prefetches blocks, and as many stay resident as the memory
allows. Here the resident blocks are spaced evenly over the network, so that every load overlaps
with as much computing as possible, and memory measured in the run decides their number. The result
of a network is the same, bit for bit, whether its blocks are streamed or resident.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import mlx.core as mx

from mlx_sora.loading.blocks import BlockSource
from mlx_sora.memory.residency import Residency, evenly_spaced

Block = TypeVar("Block")

#: Streamed blocks in memory at a time: one that computes and one that is prefetched.
SLOTS = 2

#: CPU streams that no loader uses. MLX never frees a stream and its thread, so a loader reuses the
#: stream of an earlier one.
_idle_streams: queue.SimpleQueue[mx.Stream] = queue.SimpleQueue()


@dataclass
class StreamStats:
    """Blocks and stored bytes read; seconds that loading took, and that the run waited for it."""

    loads: int = 0
    nbytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0


class BlockStream(Generic[Block]):
    """Stream of a network's blocks from disk. Fills BlockProvider.

    A context manager, for one run in one thread. resident: number of blocks that stay in memory
    once loaded, or a Residency that decides. cyclic: the first block follows the last one, so it
    may be prefetched, and resident blocks pay off. prefetch: False loads each block in `get`.
    A failed read raises WeightsError from `get` and closes the stream.
    """

    def __init__(
        self,
        source: BlockSource[Block],
        resident: int | Residency = 0,
        *,
        cyclic: bool = False,
        prefetch: bool = True,
    ) -> None:
        self.source = source
        self.stats = StreamStats()
        self._cyclic, self._prefetch = cyclic, prefetch
        self._policy = resident if isinstance(resident, Residency) else None
        self._resident: frozenset[int] = frozenset()
        if isinstance(resident, int):
            self._resident = evenly_spaced(len(source), max(0, resident))
        self._should_measure = self._policy is not None and cyclic
        self._is_measuring = False
        self._may_prefetch = prefetch
        self._loaded_blocks: set[int] = set()
        self._pending: deque[int] = deque()
        self._loader: _Loader[Block] | None = None
        self._is_closed = False

    @property
    def resident(self) -> frozenset[int]:
        """Blocks that stay in memory once they are loaded."""
        return self._resident

    def __enter__(self) -> BlockStream[Block]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, index: int) -> Block:
        """Return block `index` with its weights; wait for them if necessary."""
        if self._is_closed:
            raise RuntimeError("this block stream is closed")
        if index == 0 and self._should_measure:
            self._begin_measuring()
        if index not in self._loaded_blocks:
            self.source.assign(index, self._load(index))
            self._loaded_blocks.add(index)
        return self.source.blocks[index]

    def release(self, index: int, output: mx.array) -> None:
        """Evaluate `output`, drop block `index` unless it is resident, and prefetch the next."""
        mx.eval(output)
        if self._is_measuring:
            self._decide(index)
        if index not in self._resident:
            self._drop(index)
        self._request_ahead(index)

    def remeasure(self) -> None:
        """Measure the next pass again: its memory differs (batch size, merged tokens).

        A fixed number of resident blocks stays as it is.
        """
        self._should_measure = self._policy is not None and self._cyclic

    def shrink(self) -> bool:
        """Measure again how many blocks fit; return whether any are resident now."""
        self.remeasure()
        return bool(self._resident)

    def close(self) -> None:
        """Join the thread and drop the weights of every block. Further calls do nothing."""
        self._is_closed = True
        loader, self._loader = self._loader, None
        self._pending.clear()
        if loader is not None:
            loader.close()
        if self._policy is not None:
            self._policy.stop_measuring()
        for index in tuple(self._loaded_blocks):
            self._drop(index)

    def _begin_measuring(self) -> None:
        assert self._policy is not None
        self._should_measure, self._is_measuring = False, True
        self._resident, self._may_prefetch = frozenset(), False
        self._discard_requests()
        for index in tuple(self._loaded_blocks):
            self._drop(index)
        self._policy.start_measuring()

    def _decide(self, index: int) -> None:
        assert self._policy is not None
        source = self.source
        plan = self._policy.record_block(index, source.nbytes, source.load_peak_bytes)
        if plan is not None:
            self._is_measuring = False
            self._resident = evenly_spaced(len(source), plan.resident)
            self._may_prefetch = self._prefetch and plan.prefetch

    def _load(self, index: int) -> dict[str, mx.array]:
        """Return the weights of block `index`, prefetched or loaded now."""
        while self._pending and self._pending[0] != index:
            self._receive()
        if not self._pending:
            self._request(index)
        self._request_ahead(index)
        return self._receive()

    def _request_ahead(self, index: int) -> None:
        """Request the blocks after `index`, as far as there are slots."""
        if not self._may_prefetch:
            return
        last = self._pending[-1] if self._pending else index
        streamed = len(self._loaded_blocks - self._resident) + len(self._pending)
        for step in range(1, len(self.source) + 1):
            following = last + step
            if streamed >= SLOTS or (following >= len(self.source) and not self._cyclic):
                return
            following %= len(self.source)
            if following in self._pending or following in self._loaded_blocks - self._resident:
                return
            if following not in self._loaded_blocks:
                self._request(following)
                streamed += 1

    def _request(self, index: int) -> None:
        if self._loader is None:
            self._loader = _Loader(self.source)
        self._pending.append(index)
        self._loader.request(index)

    def _receive(self) -> dict[str, mx.array]:
        """Return the weights of the oldest request. A failed read closes the stream."""
        assert self._loader is not None
        start = time.perf_counter()
        loaded = self._loader.receive()
        self.stats.wait_seconds += time.perf_counter() - start
        if loaded.error is not None:
            self.close()
            raise loaded.error
        index = self._pending.popleft()
        self.stats.loads += 1
        self.stats.nbytes += self.source.disk_bytes[index]
        self.stats.load_seconds += loaded.seconds
        return loaded.weights

    def _discard_requests(self) -> None:
        while self._pending:
            self._receive()

    def _drop(self, index: int) -> None:
        self.source.clear(index)
        self._loaded_blocks.discard(index)


@dataclass(frozen=True)
class _LoadResult:
    """Weights of a block and the seconds that loading took, or its error."""

    weights: dict[str, mx.array]
    seconds: float = 0.0
    error: BaseException | None = None


class _Loader(Generic[Block]):
    """Thread that loads requested blocks in order, until it is closed or a read fails."""

    def __init__(self, source: BlockSource[Block]) -> None:
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_LoadResult] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_load_blocks,
            args=(source, self._requests, self._results, self._stop),
            name=f"load {source.name}",
            daemon=True,
        )
        self._thread.start()

    def request(self, index: int) -> None:
        self._requests.put(index)

    def receive(self) -> _LoadResult:
        return self._results.get()

    def close(self) -> None:
        self._stop.set()
        self._requests.put(None)
        self._thread.join()


def _load_blocks(
    source: BlockSource[Block],
    requests: queue.SimpleQueue[int | None],
    results: queue.SimpleQueue[_LoadResult],
    stop: threading.Event,
) -> None:
    """Load blocks in the thread. Results are evaluated: MLX ties lazy arrays to their thread."""
    stream = _acquire_stream()
    try:
        while (index := requests.get()) is not None and not stop.is_set():
            start = time.perf_counter()
            try:
                weights = source.load(index, stream)
            except BaseException as error:
                results.put(_LoadResult({}, error=error))
                return  # do not reuse the stream: its state after an error is unknown
            results.put(_LoadResult(weights, time.perf_counter() - start))
            del weights
        _idle_streams.put(stream)
    finally:
        # MLX's rule for ending threads. It frees the streams that MLX made for this one, not ours.
        mx.clear_streams()


def _acquire_stream() -> mx.Stream:
    try:
        return _idle_streams.get_nowait()
    except queue.Empty:
        # Only this kind of stream may be used by several threads, one after the other.
        return mx.new_thread_unsafe_stream(mx.cpu)
