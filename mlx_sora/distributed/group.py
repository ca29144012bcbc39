"""The ranks of a run and their collectives, on top of mx.distributed.

`mlx.launch` (or mpirun) starts the ranks. A process that was started by itself is one rank without
a group: its collectives return at once and load no MLX.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_sora import errors
from mlx_sora.distributed.launch import launch_backend
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.geometry import Size

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from mlx_sora.distributed.watchdog import Watchdog

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """Ranks that make a video together. All of them call each collective, in the same order.

    group: None for a single process. watchdog: ends this rank when another fails. ring: neighbours
    can send to each other (`exchange`). sent_bytes: bytes that this rank has sent, as a ring counts
    them.
    """

    def __init__(
        self,
        group: mx.distributed.Group | None = None,
        watchdog: Watchdog | None = None,
        *,
        ring: bool = False,
    ) -> None:
        self._group, self._watchdog, self.ring = group, watchdog, ring
        self._recv_stream: mx.Stream | None = None
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.sent_bytes = 0

    @property
    def is_rank0(self) -> bool:
        """True on the rank that writes files and reports to the user."""
        return self.rank == 0

    @property
    def is_watched(self) -> bool:
        """True if other ranks may wait for this one."""
        return self._watchdog is not None

    def single_rank(self) -> Ranks:
        """Return this rank as one without others, which still shows them its progress."""
        return Ranks(watchdog=self._watchdog)

    def tick(self) -> None:
        """Show the other ranks a sign of progress."""
        if self._watchdog is not None:
            self._watchdog.tick()

    @contextmanager
    def allow_silence(self, seconds: float, *, idle: bool) -> Iterator[None]:
        """Let this rank compute inside the block for so long from one sign to the next.

        idle: it may use no processor time meanwhile, as a GPU computes.
        """
        if self._watchdog is None:
            yield
            return
        self._watchdog.allow_silence(seconds if idle else 0.0, seconds)
        try:
            yield
        finally:
            self._watchdog.allow_silence(0.0, 0.0)

    def all_gather(self, x: mx.array) -> mx.array:
        """Return the x of all ranks, which have one shape, as [size, *x.shape]. Lazy."""
        if self._group is None:
            return x[None]
        import mlx.core as mx

        self._begin_collective((self.size - 1) * x.nbytes)
        return mx.distributed.all_gather(x[None], group=self._group)

    def exchange(self, x: mx.array, shape: Sequence[int]) -> mx.array:
        """Send x to the neighbour (ranks 0 and 1, 2 and 3, ...); return its array of `shape`."""
        import mlx.core as mx

        if self._recv_stream is None:
            self._recv_stream = mx.new_thread_unsafe_stream(mx.cpu)
        self._begin_collective(x.nbytes)
        x, other = mx.contiguous(x), self.rank ^ 1
        mx.eval(x)
        # Receive while sending: if both sent first, long arrays would deadlock.
        received = mx.distributed.recv(
            shape, x.dtype, other, group=self._group, stream=self._recv_stream
        )
        mx.async_eval(received)
        mx.eval(mx.distributed.send(x, other, group=self._group))
        mx.eval(received)
        return received

    def split(self, color: int) -> Ranks | None:
        """Return the sub-group of the ranks with this color; None if the backend cannot split."""
        assert self._group is not None, "a single process has no sub-groups"
        try:
            return Ranks(self._group.split(color), self._watchdog)
        except RuntimeError:
            return None

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, by rank. Lengths may differ."""
        if self._group is None:
            return [data]
        import mlx.core as mx

        from mlx_sora.runtime.device import to_numpy

        lengths: list[int] = self.all_gather(mx.array(len(data), mx.int64)).tolist()  # type: ignore[assignment]
        longest = max(lengths)
        if longest == 0:
            return [b""] * self.size
        own = mx.array(memoryview(data.ljust(longest, b"\0")))  # type: ignore[arg-type]
        gathered = to_numpy(self.all_gather(own)).tobytes()
        return [gathered[i * longest : i * longest + n] for i, n in enumerate(lengths)]

    def all_gather_frames(self, frames: np.ndarray | None, size: Size) -> Iterator[np.ndarray]:
        """Yield the frames uint8 [n, H, W, 3] of all ranks in order; None from a rank without."""
        if self.size == 1:
            if frames is not None:
                yield frames
            return
        import numpy as np

        for part in self.all_gather_bytes(b"" if frames is None else frames.tobytes()):
            if part:
                yield np.frombuffer(part, np.uint8).reshape(-1, size.height, size.width, 3)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the plain JSON values of all ranks, by rank."""
        return [json.loads(data) for data in self.all_gather_bytes(json.dumps(value).encode())]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the plain JSON value of rank `root`. Other ranks' values are ignored."""
        data = json.dumps(value).encode() if self.rank == root else b""
        return json.loads(self.all_gather_bytes(data)[root])

    def broadcast(self, x: mx.array | None, root: int = 0) -> mx.array:
        """Return the array of rank `root`, evaluated. Other ranks' arrays are ignored."""
        if self._group is None:
            assert x is not None, "the root gives the array"
            return x
        import mlx.core as mx

        header = None if x is None else (x.shape, str(x.dtype).split(".")[-1])
        shape, dtype = self.broadcast_object(header, root)
        own = x if self.rank == root and x is not None else mx.zeros(shape, getattr(mx, dtype))
        received = mx.contiguous(self.all_gather(own)[root])
        mx.eval(received)
        return received

    def broadcast_state(self, value: Any, root: int = 0) -> Any:
        """Return the value of rank `root`: arrays and JSON values, in mappings and lists.

        Other ranks' values are ignored. With several ranks, tuples come back as lists.
        """
        if self._group is None:
            return value
        from mlx_sora.utils.state import flatten_state, unflatten_state

        arrays: dict[str, mx.array] = {}
        record = self.broadcast_object(flatten_state(value, "root", arrays), root)
        names = self.broadcast_object(list(arrays), root)
        received = {name: self.broadcast(arrays.get(name), root) for name in names}
        return unflatten_state(record, received)

    def on_rank0(self, work: Callable[[], Result]) -> Result | None:
        """Return `work()` on rank 0, None on the others. Its error is raised on all ranks."""
        with self.collective_errors():
            return work() if self.is_rank0 else None

    def stage_on_rank0(
        self, stage: Generator[Item, None, Result]
    ) -> Generator[Item, None, Result | None]:
        """Yield the events of `stage` and return its value on rank 0 only, as `on_rank0`."""
        with self.collective_errors():
            if self.is_rank0:
                return (yield from stage)
        return None

    def raise_if_all_fail(self, check: Callable[[], None]) -> None:
        """Run `check`; raise its MlxSoraError only if it fails on every rank."""
        failure: MlxSoraError | None = None
        try:
            check()
        except MlxSoraError as error:
            failure = error
        failed = self.all_gather_object(failure is not None)
        if failure is not None and all(failed):
            raise failure

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """If the block raises on one rank, raise on all. The block must not call collectives.

        All raise the error of the lowest rank that has one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.size > 1:
            failure = self._first_error(failure)
        if failure is not None:
            if isinstance(failure, MlxSoraError):
                failure.on_all_ranks = True
            raise failure

    @contextmanager
    def watchdog_scope(self) -> Iterator[None]:
        """If an error or interrupt ends the block on one rank, end it on all.

        Raises RankLostError if another rank failed. If the main thread hangs in a collective that
        will never return, the process ends with that error's line and exit code.
        """
        if self._watchdog is None:
            yield
            return
        with self._watchdog.scope():
            yield

    def watch_events(self, events: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Yield the events inside a watchdog scope."""
        with self.watchdog_scope(), closing(events):
            for event in events:
                self.tick()
                yield event

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raise UsageError on all ranks if the facts of one differ from those of rank 0."""
        gathered = self.all_gather_object(dict(facts))
        for rank, other in enumerate(gathered):
            for name in {**gathered[0], **other}:
                if other.get(name) != gathered[0].get(name):
                    error = UsageError(
                        f"Rank {rank} has {name} {_short(other.get(name))}, rank 0 has "
                        f"{_short(gathered[0].get(name))}.",
                        "Give all ranks the same versions, weights and request.",
                    )
                    error.on_all_ranks = True
                    raise error

    def _begin_collective(self, sent_bytes: int) -> None:
        if self._watchdog is not None:
            self._watchdog.begin_collective()
        self.sent_bytes += sent_bytes

    def _first_error(self, own: Exception | None) -> Exception | None:
        mine = None if own is None else [socket.gethostname(), *serialize_error(own)]
        for rank, other in enumerate(self.all_gather_object(mine)):
            if other is not None:
                host, kind, message, fix = other
                where = f"Rank {rank} on {host} ended with an error: " if rank else ""
                return own if rank == self.rank else deserialize_error(kind, where + message, fix)
        return None


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def serialize_error(error: Exception) -> tuple[str, str, str]:
    """Return class name, message and fix of an error."""
    if isinstance(error, MlxSoraError):
        return type(error).__name__, *error.in_flags
    return "MlxSoraError", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", ""


def deserialize_error(kind: str, message: str, fix: str) -> MlxSoraError:
    """Return the error of another rank."""
    error_class: type[MlxSoraError] = getattr(errors, kind, MlxSoraError)
    return error_class(message, fix)


@cache
def init_ranks() -> Ranks:
    """Return the ranks that this process was launched with; a single one without a launcher.

    Raises MlxSoraError if they cannot connect.
    """
    backend = launch_backend()
    if backend is None:
        return Ranks()
    from mlx_sora.distributed.watchdog import launched_watchdog

    watchdog = launched_watchdog()
    with nullcontext() if watchdog is None else watchdog.scope():
        if watchdog is not None:
            watchdog.meet()
        import mlx.core as mx

        try:
            group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise MlxSoraError(
                f"The other ranks cannot be reached: {reason}.",
                "Check the host file and that every machine can reach the next.",
            ) from None
        if watchdog is not None:
            watchdog.connect(Ranks(group).all_gather_bytes)
    return Ranks(group, watchdog, ring=backend == "ring")
