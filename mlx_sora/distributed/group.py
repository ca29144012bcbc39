"""The processes that make a video together: who they are, and what they tell each other.

They are started by `mlx.launch` (or mpirun) and found by MLX's own distributed engine; started
without, a process is alone and none of it is touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx

from mlx_sora import errors
from mlx_sora.distributed.launch import launched
from mlx_sora.distributed.watchdog import Watchdog
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.utils.state import flatten_state, unflatten_state

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """The processes of a run. group: None for one alone, which tells nobody anything.

    watch: over the others, if anybody watches. ring: neighbours can be spoken to alone. Every
    method has to be called by all of them, in the same order.
    """

    def __init__(
        self,
        group: mx.distributed.Group | None = None,
        watch: Watchdog | None = None,
        *,
        ring: bool = False,
    ) -> None:
        self._group, self._watch, self.ring = group, watch, ring
        self._receiving: mx.Stream | None = None
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        #: Bytes that this rank has sent, as a ring counts them.
        self.sent_bytes = 0

    @property
    def is_rank0(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def all_gather(self, x: mx.array) -> mx.array:
        """Arrays of one shape from all, [size, *x.shape], lazy."""
        if self._group is None:
            return x[None]
        if self._watch is not None:
            self._watch.progress()
        self.sent_bytes += (self.size - 1) * x.nbytes
        return mx.distributed.all_gather(x[None], group=self._group)

    def exchange(self, x: mx.array, shape: Sequence[int]) -> mx.array:
        """x to the neighbour (of ranks 0 and 1, 2 and 3, ...), its array of `shape` in return."""
        if self._receiving is None:
            self._receiving = mx.new_thread_unsafe_stream(mx.cpu)
        if self._watch is not None:
            self._watch.progress()
        x, other = mx.contiguous(x), self.rank ^ 1
        mx.eval(x)
        self.sent_bytes += x.nbytes
        # Both at a time: were all to send first, long arrays would wait for each other for ever.
        theirs = mx.distributed.recv(
            shape, x.dtype, other, group=self._group, stream=self._receiving
        )
        mx.async_eval(theirs)
        mx.eval(mx.distributed.send(x, other, group=self._group))
        mx.eval(theirs)
        return theirs

    def split(self, color: int) -> Ranks | None:
        """Those of one color among themselves; None where the backend knows no groups."""
        assert self._group is not None, "there is nobody to part from"
        try:
            return Ranks(self._group.split(color), self._watch)
        except RuntimeError:
            return None

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """What each rank has to say, by rank."""
        if self._group is None:
            return [data]
        lengths: list[int] = self.all_gather(mx.array(len(data), mx.int64)).tolist()  # type: ignore[assignment]
        longest = max(lengths)
        if longest == 0:
            return [b""] * self.size
        own = mx.array(memoryview(data.ljust(longest, b"\0")))  # type: ignore[arg-type]
        found = memoryview(self.all_gather(own)).tobytes()  # type: ignore[arg-type]
        return [found[i * longest : i * longest + n] for i, n in enumerate(lengths)]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Plain JSON values of all, by rank."""
        return [json.loads(data) for data in self.all_gather_bytes(json.dumps(value).encode())]

    def broadcast_object(self, value: Any) -> Any:
        """A plain JSON value of the first rank; what others give is not looked at."""
        data = json.dumps(value).encode() if self.is_rank0 else b""
        return json.loads(self.all_gather_bytes(data)[0])

    def broadcast(self, x: mx.array | None) -> mx.array:
        """An array of the first rank, evaluated; what others give is not looked at."""
        if self._group is None:
            assert x is not None, "one process alone has what it asks for"
            return x
        kind = None if x is None else (x.shape, str(x.dtype).split(".")[-1])
        shape, dtype = self.broadcast_object(kind)
        own = x if self.is_rank0 and x is not None else mx.zeros(shape, getattr(mx, dtype))
        found = mx.contiguous(self.all_gather(own)[0])
        mx.eval(found)
        return found

    def broadcast_state(self, value: Any) -> Any:
        """Return rank 0's value: arrays and plain JSON values, nested in mappings and lists.

        Other ranks' values are ignored. With several ranks, tuples come back as lists.
        """
        if self._group is None:
            return value
        arrays: dict[str, mx.array] = {}
        record = self.broadcast_object(flatten_state(value, "root", arrays))
        names = self.broadcast_object(list(arrays))
        return unflatten_state(record, {name: self.broadcast(arrays.get(name)) for name in names})

    def on_rank0(self, work: Callable[[], Item]) -> Item | None:
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
        """Raise what `check` raises, where it does on every rank."""
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
        """What fails on one rank in the block, which is about no exchange, fails on all of them.

        All then raise the first rank's error, or else that of the first that has one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.size > 1:
            failure = self._first_failure(failure)
        if failure is not None:
            if isinstance(failure, MlxSoraError):
                failure.on_all_ranks = True
            raise failure

    @contextmanager
    def watchdog_scope(self) -> Iterator[None]:
        """A block whose end by any error or interrupt, on any rank, ends it on all of them.

        Raises RankLostError where it was another's. Where the main thread hangs in an exchange that
        will never be, the process ends with that error's line and exit code.
        """
        if self._watch is None:
            yield
            return
        with self._watch.block():
            yield

    def watch_events(self, events: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """The same events, in a watched block."""
        with self.watchdog_scope(), closing(events):
            for event in events:
                if self._watch is not None:
                    self._watch.tick()
                yield event

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raise UsageError, on all ranks, where one knows something else than the first."""
        told = self.all_gather_object(dict(facts))
        for rank, other in enumerate(told):
            for name in {**told[0], **other}:
                if other.get(name) != told[0].get(name):
                    raise UsageError(
                        f"Rank {rank} has {name} {_short(other.get(name))}, rank 0 has "
                        f"{_short(told[0].get(name))}.",
                        "Give all ranks the same versions, weights and request.",
                    )

    def _first_failure(self, own: Exception | None) -> Exception | None:
        failures = self.all_gather_object(None if own is None else serialize_error(own))
        for rank, other in enumerate(failures):
            if other is not None:
                kind, message, fix = other
                return own if rank == self.rank else deserialize_error(kind, message, fix, rank)
        return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def serialize_error(error: Exception) -> tuple[str, str, str]:
    """Class, message and fix of an error."""
    if isinstance(error, MlxSoraError):
        return type(error).__name__, error.message, error.fix
    return "MlxSoraError", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", ""


def deserialize_error(kind: str, message: str, fix: str, rank: int = 0) -> MlxSoraError:
    """Another rank's error as our own; names the rank unless it is the first."""
    known: type[MlxSoraError] = getattr(errors, kind, MlxSoraError)
    return known(f"rank {rank}: {message}" if rank else message, fix)


@cache
def init_ranks() -> Ranks:
    """The ranks that this process was launched with. Raises MlxSoraError where they do not meet."""
    backend = launched()
    if backend is None:
        return Ranks()
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise MlxSoraError(
            f"The other ranks cannot be reached: {reason}.",
            "Check the host file and that every machine can reach the next.",
        ) from None
    ranks = Ranks(group)
    if ranks.size > 1:
        watch = Watchdog(ranks.rank, ranks.size, ranks.all_gather_bytes)
        ranks = Ranks(group, watch, ring=backend == "ring")
    return ranks
