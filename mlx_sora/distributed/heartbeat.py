"""Heartbeats between ranks, so that none waits for ever for one that is gone.

MLX's collectives block until all ranks have come and do not say which one is missing, or why. So
every rank keeps a TCP connection to rank 0. Each second both sides send how many collectives they
have begun and how much processor time they have used. Rank 0 decides which rank is at fault and
tells all others, so that all ranks end with the same cause. Each rank also says for how long its
GPU or its processor may work from one sign of progress to the next.
"""

from __future__ import annotations

import faulthandler
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from mlx_sora.distributed.failure import SCARCE_MEMORY, Failure, PeerState, Timeouts
from mlx_sora.distributed.rendezvous import Connection, Rendezvous
from mlx_sora.errors import INTERRUPTED, MlxSoraError
from mlx_sora.runtime.footprint import available_ram

_NETWORK_FIX = "Let them reach each other on any port, or run on one of them."

#: Bytes of the message with rank 0's addresses, port and token.
_ADDRESS_BYTES = 1024

#: Seconds after an interrupt for a lost rank to be noticed: launchers end all when one is lost.
_INTERRUPT_GRACE = 0.5

#: Collective that returns the bytes of every rank, by rank; all give the same number of bytes.
AllGatherBytes = Callable[[bytes], Sequence[bytes]]


class Heartbeat:
    """Heartbeat of this rank. name: of the rank and its host, for messages.

    coordinator: where MLX's backend will listen on rank 0, "host:port"; empty if unknown.
    on_failure: called in the heartbeat's thread if another rank failed, as the main thread may be
    blocked in a collective. failure: why the run is over, or None.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        coordinator: str,
        on_failure: Callable[[Failure], None],
        timeouts: Timeouts | None = None,
    ) -> None:
        self.rank, self.size, self._host = rank, size, socket.gethostname()
        self.name = f"Rank {rank} on {self._host}"
        self.failure: Failure | None = None
        self._timeouts, self._on_failure = timeouts or Timeouts(), on_failure
        self._collectives, self._ticks, self._failed_here = 0, 0, False
        self._idle, self._busy, self._dumps_crash = 0.0, 0.0, False
        self._failed, self._closed = threading.Event(), threading.Event()
        #: All are connected to rank 0, or this rank is; all wait for MLX; rank 0 has ended.
        self._connected, self._begin, self._over = (threading.Event() for _ in range(3))
        self._lock, self._now, self._last_awake = threading.Lock(), 0.0, time.monotonic()
        self._peers = {other: PeerState() for other in range(size)}
        self._connections: dict[int, Connection] = {}
        self._ready: set[int] = set()
        self._rendezvous, self._selector = (
            Rendezvous(rank, coordinator),
            selectors.DefaultSelector(),
        )
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def begin_collective(self) -> None:
        """Count a collective that the main thread begins."""
        self._collectives += 1

    def tick(self) -> None:
        """Count a sign of other work in the main thread."""
        self._ticks += 1

    def allow_silence(self, idle: float, busy: float) -> None:
        """Let this rank seem idle, or compute, for so long; never less than Timeouts."""
        self._idle, self._busy = float(round(idle)), float(round(busy))

    def meet(self) -> None:
        """Wait until all ranks are there, or for as long as they may take to find each other."""
        if self._rendezvous.is_early:
            if self.rank and self._connected.wait(self._timeouts.connect):
                self._send({"ready": True})
            if self.rank == 0 or self._connected.is_set():
                self._begin.wait(self._timeouts.connect)
        if self.rank == 0:
            self._send({"begin": True})

    def connect(self, all_gather: AllGatherBytes) -> None:
        """Connect the ranks that have not met, by a collective. Raises MlxSoraError."""
        address = json.dumps(self._rendezvous.address).encode().ljust(_ADDRESS_BYTES)
        self._rendezvous.address = address = json.loads(all_gather(address)[0])
        if self._connected.wait(self._timeouts.connect) or self.failure is not None:
            return
        if self.rank == 0:
            missing = ", ".join(map(str, self._missing()))
            raise MlxSoraError(f"Rank {missing} did not find rank 0.", _NETWORK_FIX)
        place = f"{', '.join(address['hosts'])}, port {address['port']}"
        raise MlxSoraError(f"Rank {self.rank} cannot reach rank 0 at {place}.", _NETWORK_FIX)

    def fail(self, cause: str, exit_code: int = 1) -> None:
        """End the run and report the cause to the other ranks."""
        failure = Failure(self.rank, cause, exit_code, self._host)
        self._set_failure(failure, here=True)
        if self._failed_here:
            self._thread.join()

    def interrupt(self) -> Failure | None:
        """End the run as interrupted, or return why it is over: a launcher ends all if one is lost.

        The lost one may be one that has not connected.
        """
        if self.wait(_INTERRUPT_GRACE) is None:
            missing = self._missing()
            if not missing:
                self.fail("was interrupted.", INTERRUPTED)
                return None
            cause = f"had not connected when rank {self.rank} was interrupted."
            self._set_failure(Failure.of_other(missing[0], cause, exit_code=INTERRUPTED))
        return self.wait(0.0)

    def wait(self, seconds: float) -> Failure | None:
        """Return why another rank ended the run, as soon as known; None after so many seconds."""
        self._failed.wait(seconds)
        return None if self._failed_here else self.failure

    def wait_for_rank0(self, seconds: float) -> bool:
        """Wait until rank 0 is connected. Return False after so many seconds."""
        return self._connected.wait(seconds)

    def wait_for_end(self, seconds: float) -> None:
        """Wait until rank 0 is done, or so many seconds."""
        self._over.wait(seconds)

    def say_farewell(self) -> None:
        """Wait until the other ranks have read why the run is over, and close the connections."""
        for connection in list(self._connections.values()):
            connection.shut_down(self._timeouts.farewell)

    def close(self) -> None:
        """End the heartbeat: this rank is done. Others fail if they begin more collectives."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
        for connection in self._connections.values():
            connection.send(self._state(0.0))
            connection.send({"finished": True})
            connection.shut_down(self._timeouts.interval)
        if self._dumps_crash:
            faulthandler.disable()
        for connection in self._connections.values():
            connection.socket.close()
        self._rendezvous.close()

    def _missing(self) -> list[int]:
        """Return the ranks that should be connected to this one and are not."""
        expected = range(1, self.size) if self.rank == 0 else [0]
        return [rank for rank in expected if rank not in self._connections]

    def _state(self, cpu_seconds: float) -> dict[str, Any]:
        return {
            "collectives": self._collectives,
            "ticks": self._ticks,
            "cpu_seconds": cpu_seconds,
            "idle": self._idle,
            "busy": self._busy,
            "memory": available_ram(),
        }

    def _run(self) -> None:
        """Receive, send and check until the run is over."""
        if self.rank == 0:
            for source, read in self._rendezvous.sources():
                self._selector.register(source, selectors.EVENT_READ, read)
        last_sent, interval = 0.0, self._timeouts.interval
        while not self._closed.is_set() and self.failure is None:
            self._advance_clock()
            if self.rank and not self._connections:
                self._find_rank0()
            found = [self._read(key.data) for key, _ in self._selector.select(interval / 4)]
            if time.monotonic() - last_sent >= interval:
                last_sent = time.monotonic()
                self._send_heartbeat()
                found += self._check_peers()
            # Whoever was lost is named, not those that the launcher has ended for it.
            failures = sorted(filter(None, found), key=lambda each: each.exit_code == INTERRUPTED)
            for failure in failures[:1]:
                self._set_failure(failure)
        self._selector.close()
        if self.failure is not None:
            self._failed.wait()  # until the cause is sent
            if self._failed_here:
                self.say_farewell()
            else:
                self._on_failure(self.failure)
        self._over.set()

    def _advance_clock(self) -> None:
        """Advance the time by which others are judged: not while this process is stopped itself."""
        now = time.monotonic()
        self._now += min(now - self._last_awake, self._timeouts.silence / 4)
        self._last_awake = now

    def _find_rank0(self) -> None:
        connection = self._rendezvous.find_rank0(self._timeouts.interval / 4)
        if connection is not None:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            self._connections[0] = connection

    def _read(self, source: Connection | Callable[[], Connection | None]) -> Failure | None:
        """Read what has arrived. Return the failure of the other side, if it is one."""
        if not isinstance(source, Connection):
            accepted = source()
            if accepted is not None:
                self._selector.register(accepted.socket, selectors.EVENT_READ, accepted)
            return None
        messages = source.receive()
        if messages is None:
            self._selector.unregister(source.socket)
            return self._lose(source)
        failures = [self._handle(source, message) for message in messages]
        return next(filter(None, failures), None)

    def _handle(self, connection: Connection, message: dict[str, Any]) -> Failure | None:
        """Take in one message; return the failure that it reports."""
        if connection.rank < 0:
            self._introduce(connection, message)
        elif "failure" in message:
            return Failure(**message["failure"])
        elif "ready" in message:
            self._ready.add(connection.rank)
            if len(self._ready) == self.size - 1:
                self._begin.set()
        elif "begin" in message:
            self._begin.set()
        elif "finished" in message:
            connection.finished = True
            self._over.set()
        else:
            self._peers[connection.rank].record_heartbeat(self._now, message)
        return None

    def _introduce(self, connection: Connection, message: dict[str, Any]) -> None:
        """Take in who the other side is. Rank 0 answers ranks of this run, and nobody else."""
        address = self._rendezvous.address or {}
        known = self.rank > 0 or message.get("token") == address.get("token")
        if not known or message.get("rank") not in self._missing() + [0] * (self.rank > 0):
            connection.shut_down(0)
            return
        connection.read_introduction(message)
        self._connections[connection.rank] = connection
        self._peers[connection.rank].begin(self._now)
        if self.rank == 0:
            connection.introduce(0, "")
        if connection.rank <= 1 and not faulthandler.is_enabled():
            # What Python says of a crash reaches the rank that reports it.
            faulthandler.enable(connection.socket.fileno(), all_threads=False)
            self._dumps_crash = True
        if not self._missing():
            self._connected.set()
            if self.rank == 0:
                for source, _ in self._rendezvous.sources():
                    self._selector.unregister(source)
                self._rendezvous.close()

    def _lose(self, connection: Connection) -> Failure | None:
        """Return the failure of a rank whose connection is closed, unless it is done."""
        rank = connection.rank
        if rank < 0:  # not a rank of this run; or rank 0 took this one for that
            if self.rank:
                self._connections.clear()
            return None
        if connection.finished or self.failure is not None:
            return None
        memory = self._peers[rank].memory
        if connection.crash:
            cause = f"crashed: {connection.crash}."
        elif memory is not None and memory < SCARCE_MEMORY:
            cause = (
                f"was killed, with {memory / 1e6:.0f} MB of memory left on its machine: it may "
                "have run out of memory."
            )
        else:
            cause = "was killed: its process ended without an error."
        return Failure.of_other(rank, cause, connection.host)

    def _send(self, message: dict[str, Any]) -> None:
        for connection in list(self._connections.values()):
            connection.send(message)

    def _send_heartbeat(self) -> None:
        # Without the time of this thread: the heartbeat itself is no work.
        state = self._state(time.process_time() - time.thread_time())
        self._peers[self.rank].record_heartbeat(self._now, state)
        self._send(state)

    def _check_peers(self) -> list[Failure | None]:
        """Return silent ranks; on rank 0, also those that hang while others wait for them."""
        found: list[Failure | None] = []
        now, silence = self._now, self._timeouts.silence
        for rank, connection in self._connections.items():
            peer = self._peers[rank]
            if connection.finished and peer.collectives < self._collectives:
                found.append(Failure.of_other(rank, "ended before the others.", connection.host))
            judged = connection.rank == rank and not connection.finished
            if judged and now - peer.last_heard > silence:
                cause = f"sent no heartbeat for {silence:g} s: it is stopped or cut off."
                found.append(Failure.of_other(rank, cause, connection.host))
                if connection.is_local:  # if it is stopped, it cannot end, and launchers wait
                    with suppress(OSError):
                        os.kill(connection.pid, signal.SIGCONT)
        return found + (self._check_progress() if self.rank == 0 else [])

    def _check_progress(self) -> list[Failure | None]:
        """Return the ranks that hang while others wait for them, but are not silent."""
        most = max(peer.collectives for peer in self._peers.values())
        found: list[Failure | None] = []
        for rank, peer in self._peers.items():
            connection = self._connections.get(rank)
            finished = connection is not None and connection.finished
            silent = self._now - peer.last_heard > self._timeouts.silence / 3
            cause = peer.hang(self._now, self._timeouts)
            if cause and peer.collectives < most and not finished and not silent:
                host = self._host if connection is None else connection.host
                found.append(Failure(rank, cause, host=host))
        return found

    def _set_failure(self, failure: Failure, *, here: bool = False) -> None:
        """Set why the run is over and tell the others, unless it is over already."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure, self._failed_here = failure, here
        self._send({"failure": asdict(failure)})
        self._failed.set()
        self._begin.set()
        self._connected.set()
