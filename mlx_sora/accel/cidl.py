"""CI-DL, concurrent inference with dynamic loading: while block i computes, block i + 1 is read.

Mirrors the method of On-device Sora: one thread loads, and the blocks that the memory allows stay.
Here those that stay are spread evenly over the network, so that every load has as much computing as
possible to hide behind, and how many is decided from memory measured in the run. Streamed or
resident, a network's result is the same, bit for bit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import mlx.core as mx

from mlx_sora.loading.blocks import BlockSource
from mlx_sora.memory.residency import BlockSizes, Residency, evenly_spaced

Block = TypeVar("Block")

#: Streamed blocks in memory at a time: one that computes and one on its way.
SLOTS = 2

#: CPU streams to load on, while no loader has them. MLX never gives a stream and its thread back,
#: so each loader takes one that an earlier loader has left.
_idle_streams: queue.SimpleQueue[mx.Stream] = queue.SimpleQueue()


@dataclass
class StreamStats:
    """Blocks and stored bytes read; seconds the loader took, and the run waited for it."""

    loads: int = 0
    nbytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0


class BlockStream(Generic[Block]):
    """Fills the seam BlockProvider from a BlockSource. A context manager; for one run, one thread.

    resident: how many blocks stay once loaded, or a Residency that decides. cyclic: after the last
    block comes the first again, so it may be loaded ahead, and keeping any pays. prefetch: False
    loads each block when it is asked for.
    A failed read raises WeightsError from `get` and ends the stream.
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
        self._keep: frozenset[int] = frozenset()
        if isinstance(resident, int):
            self._keep = evenly_spaced(len(source), max(0, resident))
        self._undecided = self._policy is not None and cyclic
        self._measuring = False
        self._ahead_allowed = prefetch
        self._held: set[int] = set()
        self._ahead: deque[int] = deque()
        self._loader: _Loader[Block] | None = None
        self._closed = False

    @property
    def resident(self) -> frozenset[int]:
        """The blocks that stay, or will once they have been loaded."""
        return self._keep

    def __enter__(self) -> BlockStream[Block]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def get(self, index: int) -> Block:
        """Block `index` with its weights, waiting for them if need be."""
        if self._closed:
            raise RuntimeError("this stream of blocks is closed")
        if index == 0 and self._undecided:
            self._begin_measuring()
        if index not in self._held:
            self.source.assign(index, self._take(index))
            self._held.add(index)
        return self.source.blocks[index]

    def done(self, index: int, output: mx.array) -> None:
        """Evaluate `output`, take block `index` away unless it stays, have the next one read."""
        mx.eval(output)
        if self._measuring:
            self._decide(index)
        if index not in self._keep:
            self._drop(index)
        self._ask_ahead(index)

    def remeasure(self) -> None:
        """The next pass differs in memory (batch, merged tokens): measure again, decide again.

        Blocks that stay with a fixed `resident` stay.
        """
        self._undecided = self._policy is not None and self._cyclic

    def shrink(self) -> bool:
        """Have no more stay than is measured to fit, from the next pass on; whether any do now."""
        self.remeasure()
        return bool(self._keep)

    def close(self) -> None:
        """Join the thread and let go of every block's weights. Further calls do nothing."""
        self._closed = True
        loader, self._loader = self._loader, None
        self._ahead.clear()
        if loader is not None:
            loader.close()
        if self._policy is not None:
            self._policy.stop_measuring()
        for index in tuple(self._held):
            self._drop(index)

    def _begin_measuring(self) -> None:
        assert self._policy is not None
        self._undecided, self._measuring = False, True
        self._keep, self._ahead_allowed = frozenset(), False
        self._discard_ahead()
        for index in tuple(self._held):
            self._drop(index)
        self._policy.start_measuring()

    def _decide(self, index: int) -> None:
        assert self._policy is not None
        source = self.source
        room = self._policy.record_block(index, BlockSizes(source.nbytes, source.load_peak_bytes))
        if room is not None:
            self._measuring = False
            self._keep = evenly_spaced(len(source), room.resident)
            self._ahead_allowed = self._prefetch and room.prefetch

    def _take(self, index: int) -> dict[str, mx.array]:
        """Weights of block `index`, asked for ahead or now."""
        while self._ahead and self._ahead[0] != index:
            self._receive()
        if not self._ahead:
            self._ask(index)
        self._ask_ahead(index)
        return self._receive()

    def _ask_ahead(self, index: int) -> None:
        """Ask for the blocks that come after `index`, as far as there are slots."""
        if not self._ahead_allowed:
            return
        last = self._ahead[-1] if self._ahead else index
        streamed = len(self._held - self._keep) + len(self._ahead)
        for step in range(1, len(self.source) + 1):
            following = last + step
            if streamed >= SLOTS or (following >= len(self.source) and not self._cyclic):
                return
            following %= len(self.source)
            if following in self._ahead or following in self._held - self._keep:
                return
            if following not in self._held:
                self._ask(following)
                streamed += 1

    def _ask(self, index: int) -> None:
        if self._loader is None:
            self._loader = _Loader(self.source)
        self._ahead.append(index)
        self._loader.ask(index)

    def _receive(self) -> dict[str, mx.array]:
        """Weights of the block asked for first. A failed read closes the stream."""
        assert self._loader is not None
        started = time.perf_counter()
        loaded = self._loader.receive()
        self.stats.wait_seconds += time.perf_counter() - started
        if loaded.error is not None:
            self.close()
            raise loaded.error
        index = self._ahead.popleft()
        self.stats.loads += 1
        self.stats.nbytes += self.source.disk_bytes[index]
        self.stats.load_seconds += loaded.seconds
        return loaded.weights

    def _discard_ahead(self) -> None:
        while self._ahead:
            self._receive()

    def _drop(self, index: int) -> None:
        self.source.clear(index)
        self._held.discard(index)


@dataclass(frozen=True)
class _Loaded:
    """Weights of a block and the seconds they took, or the error instead."""

    weights: dict[str, mx.array]
    seconds: float = 0.0
    error: BaseException | None = None


class _Loader(Generic[Block]):
    """A thread that loads the blocks it is asked for, in order, until it is closed or one fails."""

    def __init__(self, source: BlockSource[Block]) -> None:
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[_Loaded] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_load_blocks,
            args=(source, self._asked, self._loaded, self._stop),
            name=f"load {source.name}",
            daemon=True,
        )
        self._thread.start()

    def ask(self, index: int) -> None:
        self._asked.put(index)

    def receive(self) -> _Loaded:
        """The next block in the order of asking."""
        return self._loaded.get()

    def close(self) -> None:
        self._stop.set()
        self._asked.put(None)
        self._thread.join()


def _load_blocks(
    source: BlockSource[Block],
    asked: queue.SimpleQueue[int | None],
    loaded: queue.SimpleQueue[_Loaded],
    stop: threading.Event,
) -> None:
    """The thread's work. Only evaluated arrays leave it: MLX ties lazy ones to their thread."""
    stream = _take_stream()
    while (index := asked.get()) is not None and not stop.is_set():
        started = time.perf_counter()
        try:
            weights = source.load(index, stream)
        except BaseException as error:
            loaded.put(_Loaded({}, error=error))
            return  # without giving the stream back: who knows what it was left with
        loaded.put(_Loaded(weights, time.perf_counter() - started))
        del weights
    _idle_streams.put(stream)


def _take_stream() -> mx.Stream:
    try:
        return _idle_streams.get_nowait()
    except queue.Empty:
        # The only kind of stream that later threads may use too, one after the other.
        return mx.new_thread_unsafe_stream(mx.cpu)
