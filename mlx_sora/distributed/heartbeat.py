"""Heartbeats between ranks, so that none waits for ever for one that is gone.

MLX's collectives block until all ranks have come and do not say which one is missing, or why. So
every rank keeps a TCP connection to rank 0. Each second both sides send how many collectives they
have begun and how much processor time they have used. Rank 0 decides which rank is at fault and
tells all others, so that all ranks end with the same cause. A rank whose GPU computes uses next to
no processor time, so each rank also says how long it may seem idle.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_sora.errors import MlxSoraError

_NETWORK_FIX = "Let them reach each other on any port, or run on one of them."

#: Share of a processor below which a rank counts as idle. Sampling memory takes less than half of
#: it, reading weights at 50 MB/s four times as much.
IDLE_CPU_SHARE = 0.01

#: Collective that returns the bytes of every rank, by rank; all give the same number of bytes.
AllGatherBytes = Callable[[bytes], Sequence[bytes]]


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds. interval: between heartbeats. connect: for all to find rank 0.

    silence: a rank is lost after so long without a heartbeat. idle: a rank that others wait for
    hangs after so long without a sign of work, or longer if it says so.
    """

    interval: float = 1.0
    silence: float = 12.0
    idle: float = 24.0
    connect: float = 20.0


@dataclass(frozen=True)
class Failure:
    """Reason why a run of several ranks ended: the rank at fault, the cause, the exit code."""

    rank: int
    cause: str
    exit_code: int = 1

    def __str__(self) -> str:
        return f"Rank {self.rank} {self.cause}"


@dataclass
class PeerState:
    """Last known state of a rank.

    collectives: number begun. ticks: signs of other work. cpu_seconds: processor time.
    idle: seconds that it may seem idle. last_heard: time of the last heartbeat. last_progress: of
    the last in which collectives, ticks or processor time grew.
    """

    collectives: int = 0
    ticks: int = 0
    cpu_seconds: float = 0.0
    idle: float = 0.0
    last_heard: float = field(default_factory=time.monotonic)
    last_progress: float = field(default_factory=time.monotonic)

    def record_heartbeat(
        self, collectives: int, ticks: int, cpu_seconds: float, idle: float = 0.0
    ) -> None:
        """Update the state. Processor time up to IDLE_CPU_SHARE is no progress."""
        self.last_heard, self.idle = time.monotonic(), idle
        enough = self.cpu_seconds + 0.03 + IDLE_CPU_SHARE * (self.last_heard - self.last_progress)
        if collectives > self.collectives or ticks > self.ticks or cpu_seconds > enough:
            self.collectives, self.ticks, self.cpu_seconds = collectives, ticks, cpu_seconds
            self.last_progress = self.last_heard


class Heartbeat:
    """Heartbeat of this rank. All ranks make one at the same time.

    all_gather: a collective of all ranks. failure: why the run is over, or None. on_failure: called
    in the heartbeat's thread if another rank failed, as the main thread may be blocked in a
    collective.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        all_gather: AllGatherBytes,
        on_failure: Callable[[Failure], None],
        timeouts: Timeouts | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self._timeouts = timeouts or Timeouts()
        self._on_failure = on_failure
        self._collectives, self._ticks, self._failed_here = 0, 0, False
        self._idle = 0.0
        self._failed, self._closed = threading.Event(), threading.Event()
        self._peers = {other: PeerState() for other in range(size)}
        self._connections = _rendezvous(rank, size, all_gather, self._timeouts)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def begin_collective(self) -> None:
        """Count a collective that the main thread begins."""
        self._collectives += 1

    def tick(self) -> None:
        """Count a sign of other work in the main thread."""
        self._ticks += 1

    def allow_idle(self, seconds: float) -> None:
        """Let this rank seem idle for so long from now on; never less than Timeouts.idle."""
        self._idle = float(round(seconds))

    def fail(self, cause: str, exit_code: int = 1) -> None:
        """End the run and report the cause to the other ranks."""
        if self.failure is None:
            self._failed_here = True
            self._set_failure(Failure(self.rank, cause, exit_code))
            self._thread.join()

    def wait(self, seconds: float) -> Failure | None:
        """Return why the run is over as soon as that is known; None after so many seconds."""
        self._failed.wait(seconds)
        return self.failure

    def close(self) -> None:
        """End the heartbeat: this rank is done. Others fail if they begin more collectives."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
        for connection in self._connections.values():
            connection.send(self._state(0.0))
            connection.send({"finished": True})
            connection.shut_down(self._timeouts.interval)
        for connection in self._connections.values():
            connection.socket.close()

    def _state(self, cpu_seconds: float) -> dict[str, Any]:
        return {
            "collectives": self._collectives,
            "ticks": self._ticks,
            "cpu_seconds": cpu_seconds,
            "idle": self._idle,
        }

    def _run(self) -> None:
        """Receive, send and check until the run is over."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection.socket, selectors.EVENT_READ, rank)
            last_sent = 0.0
            while not self._closed.is_set() and self.failure is None:
                for key, _ in selector.select(self._timeouts.interval / 4):
                    self._receive(key.data, selector)
                if time.monotonic() - last_sent >= self._timeouts.interval:
                    last_sent = time.monotonic()
                    self._send_heartbeat()
                    self._check_peers()
        if self.failure is not None:
            self._failed.wait()  # until the cause is sent
            for connection in self._connections.values():
                connection.shut_down(self._timeouts.interval)
            if not self._failed_here:
                self._on_failure(self.failure)

    def _receive(self, rank: int, selector: selectors.BaseSelector) -> None:
        connection = self._connections[rank]
        messages = connection.receive()
        if messages is None:
            selector.unregister(connection.socket)
            if not connection.finished:
                self._report(Failure(rank, "has died."))
            return
        for message in messages:
            if "failure" in message:
                self._report(Failure(**message["failure"]))
            elif "finished" in message:
                connection.finished = True
            else:
                self._peers[rank].record_heartbeat(**message)

    def _send_heartbeat(self) -> None:
        # Without the time of this thread: the heartbeat itself is no work.
        state = self._state(time.process_time() - time.thread_time())
        self._peers[self.rank].record_heartbeat(**state)
        for connection in self._connections.values():
            connection.send(state)

    def _check_peers(self) -> None:
        """Report silent ranks; on rank 0, also those that hang while others wait for them."""
        now, timeouts = time.monotonic(), self._timeouts
        for rank, connection in self._connections.items():
            peer = self._peers[rank]
            if connection.finished and peer.collectives < self._collectives:
                self._report(Failure(rank, "ended before the others."))
            if not connection.finished and now - peer.last_heard > timeouts.silence:
                self._report(Failure(rank, f"sent no heartbeat for {timeouts.silence:g} s."))
        if self.rank != 0:
            return
        most = max(peer.collectives for peer in self._peers.values())
        for rank, peer in self._peers.items():
            finished = rank != 0 and self._connections[rank].finished
            waited_for = not finished and peer.collectives < most
            idle = max(timeouts.idle, peer.idle)
            if waited_for and now - peer.last_progress > idle:
                self._report(Failure(rank, f"hangs: no progress for {idle:g} s."))

    def _report(self, failure: Failure) -> None:
        if self.failure is None:
            self._set_failure(failure)

    def _set_failure(self, failure: Failure) -> None:
        self.failure = failure
        for connection in self._connections.values():
            connection.send({"failure": asdict(failure)})
        self._failed.set()


class _Connection:
    """Lines of JSON over TCP. finished: the other side has said that it is done."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.finished = connection, False
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(5.0)

    def send(self, message: dict[str, Any]) -> None:
        """Send; do nothing if the other side is gone."""
        with suppress(OSError), self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived; None if the connection is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def shut_down(self, seconds: float) -> None:
        """Stop sending and read the rest: closing with unread input would lose what was sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(1 << 16):
                    return


#: Bytes of the message with rank 0's addresses, port and token.
_ADDRESS_BYTES = 1024


def _rendezvous(
    rank: int, size: int, all_gather: AllGatherBytes, timeouts: Timeouts
) -> dict[int, _Connection]:
    """Return the connections by rank: of rank 0 to all others, of any other rank to rank 0."""
    if rank:
        address = json.loads(all_gather(bytes(_ADDRESS_BYTES))[0].rstrip(b"\0"))
        return {0: _connect(rank, address, timeouts)}
    token = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=size) as server:
        address = {"hosts": _local_addresses(), "port": server.getsockname()[1], "token": token}
        all_gather(json.dumps(address).encode().ljust(_ADDRESS_BYTES, b"\0"))
        connections: dict[int, _Connection] = {}
        deadline = time.monotonic() + timeouts.connect
        while len(connections) < size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(r) for r in range(1, size) if r not in connections)
                raise MlxSoraError(f"Rank {missing} did not find rank 0.", _NETWORK_FIX) from None
            connection = _Connection(accepted)
            hello = connection.receive()
            if hello and hello[0].get("token") == token:
                connections[int(hello[0]["rank"])] = connection
            else:  # not a rank of this run
                accepted.close()
        return connections


def _connect(rank: int, address: dict[str, Any], timeouts: Timeouts) -> _Connection:
    """Connect `rank` to rank 0, at the first of its hosts that answers."""
    hosts, port = address["hosts"], address["port"]
    for host in hosts:
        with suppress(OSError):
            timeout = timeouts.connect / len(hosts)
            connection = _Connection(socket.create_connection((host, port), timeout=timeout))
            connection.send({"rank": rank, "token": address["token"]})
            return connection
    raise MlxSoraError(
        f"Rank {rank} cannot reach rank 0 at {', '.join(hosts)}, port {port}.", _NETWORK_FIX
    )


def _local_addresses() -> list[str]:
    """Return addresses of this machine: that of MLX's host file, of its name, and the loopback."""
    addresses = [_hostfile_address()]
    with suppress(OSError):
        addresses += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys([address for address in addresses if address] + ["127.0.0.1"]))[:8]


def _hostfile_address() -> str | None:
    """Return rank 0's address in the host file of MLX's ring, if there is one."""
    with suppress(KeyError, OSError, ValueError, IndexError, TypeError, AttributeError):
        with open(os.environ["MLX_HOSTFILE"], encoding="utf-8") as file:
            hosts = json.load(file)
        return str(hosts[0][0].rpartition(":")[0])
    return None
