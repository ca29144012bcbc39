"""Ranks of one run that watch each other, so that none waits for ever for one that is gone.

MLX's collectives block until all ranks have come; they say neither who is missing nor why. Beside
them, every rank keeps one TCP connection to rank 0, on which both sides tell each second that they
live, how far their work is and how much processor time it has taken. Rank 0 judges, and passes on
what it finds, so that all ranks end with the same cause.
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

#: What to do when machines do not find each other.
NETWORK = "Let them reach each other on any port, or run on one of them."

#: Share of a processor that a rank may use and yet do nothing. Sampling memory takes less than half
#: of it, reading weights at 50 MB/s four times as much.
HOUSEKEEPING = 0.01

#: Gives every rank the same number of bytes of every rank, in order.
Share = Callable[[bytes], Sequence[bytes]]


@dataclass(frozen=True)
class Timeouts:
    """Seconds. beat: between signs of life; silence: without any, a rank is lost; idle: a rank that
    others wait for and that uses no processor time hangs; connect: for all to find rank 0.
    """

    interval: float = 1.0
    silence: float = 12.0
    idle: float = 24.0
    connect: float = 20.0


@dataclass(frozen=True)
class Failure:
    """Why a run of several ranks ended: the rank at fault, what it did, and its exit code."""

    rank: int
    cause: str
    exit_code: int = 1

    def __str__(self) -> str:
        return f"Rank {self.rank} {self.cause}"


@dataclass
class PeerState:
    """What is known of a rank. work: units its main thread has begun; signs: that it has given of
    other work; busy: processor seconds. heard, moved: when it was last heard of, and when any of
    these last grew.
    """

    work: int = 0
    ticks: int = 0
    cpu_seconds: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)

    def record_heartbeat(self, work: int, signs: int, busy: float) -> None:
        """Take a sign of life. A small share of a processor is housekeeping, however long."""
        self.heard = time.monotonic()
        idle = self.cpu_seconds + 0.03 + HOUSEKEEPING * (self.heard - self.moved)
        if work > self.work or signs > self.ticks or busy > idle:
            self.work, self.ticks, self.cpu_seconds, self.moved = work, signs, busy, self.heard


class Heartbeat:
    """This rank's part of the watch; made by all ranks at the same time.

    share: a collective of all ranks. failure: why the run is over, once it is. on_failure: called
    in a thread of its own when this rank did not end the run itself, as the main thread may be held
    in a collective that never returns.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        share: Share,
        on_failure: Callable[[Failure], None],
        patience: Timeouts | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self._patience = patience or Timeouts()
        self._on_failure = on_failure
        self._work, self._signs, self._own = 0, 0, False
        self._known, self._over = threading.Event(), threading.Event()
        self._lives = {other: PeerState() for other in range(size)}
        self._links: dict[int, _Link] = _rendezvous(rank, size, share, self._patience)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """The main thread begins another unit of work that all ranks do, such as a collective."""
        self._work += 1

    def tick(self) -> None:
        """The main thread is at work of its own."""
        self._signs += 1

    def fail(self, cause: str, exit_code: int = 1) -> None:
        """This rank ends the run, and tells the others why."""
        if self.failure is None:
            self._own = True
            self._settle(Failure(self.rank, cause, exit_code))
            self._thread.join()

    def wait(self, seconds: float) -> Failure | None:
        """Why the run is over, as soon as that is known; a broken collective does not say."""
        self._known.wait(seconds)
        return self.failure

    def close(self) -> None:
        """The work is done: no rank will miss this one, unless it has come further."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
        for link in self._links.values():
            link.send({"work": self._work, "signs": self._signs, "busy": 0.0})
            link.send({"bye": True})
            link.part(self._patience.interval)
        for link in self._links.values():
            link.socket.close()

    def _settle(self, failure: Failure) -> None:
        self.failure = failure
        for link in self._links.values():
            link.send({"failure": asdict(failure)})
        self._known.set()

    def _watch(self) -> None:
        """Read, tell and judge until the run is over."""
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, rank)
            told = 0.0
            while not self._over.is_set() and self.failure is None:
                for key, _ in selector.select(self._patience.interval / 4):
                    self._read(key.data, selector)
                if time.monotonic() - told >= self._patience.interval:
                    told = time.monotonic()
                    self._tell()
                    self._judge()
        if self.failure is not None:
            for link in self._links.values():
                link.part(self._patience.interval)
            if not self._own:
                self._on_failure(self.failure)

    def _read(self, rank: int, selector: selectors.BaseSelector) -> None:
        link = self._links[rank]
        messages = link.receive()
        if messages is None:
            selector.unregister(link.socket)
            if not link.left:
                self._found(Failure(rank, "has died."))
            return
        for message in messages:
            if "failure" in message:
                self._found(Failure(**message["failure"]))
            elif "bye" in message:
                link.left = True
            else:
                self._lives[rank].record_heartbeat(**message)

    def _tell(self) -> None:
        # What watching itself costs is no sign of work.
        busy = time.process_time() - time.thread_time()
        now = {"work": self._work, "signs": self._signs, "busy": busy}
        self._lives[self.rank].record_heartbeat(**now)  # type: ignore[arg-type]
        for link in self._links.values():
            link.send(now)

    def _judge(self) -> None:
        """Miss ranks that say nothing; on rank 0, also those that others wait for in vain."""
        now, patience = time.monotonic(), self._patience
        for rank, link in self._links.items():
            life = self._lives[rank]
            if link.left and life.work < self._work:
                self._found(Failure(rank, "has ended before the others."))
            if not link.left and now - life.heard > patience.silence:
                self._found(Failure(rank, f"has not been heard of for {patience.silence:g} s."))
        if self.rank != 0:
            return
        furthest = max(life.work for life in self._lives.values())
        for rank, life in self._lives.items():
            left = rank != 0 and self._links[rank].left
            if not left and life.work < furthest and now - life.moved > patience.idle:
                self._found(Failure(rank, f"hangs: no work for {patience.idle:g} s."))

    def _found(self, failure: Failure) -> None:
        if self.failure is None:
            self._settle(failure)


class _Link:
    """Lines of JSON over a connection. left: the other side has said that it is done."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.left = connection, False
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(5.0)

    def send(self, message: dict[str, Any]) -> None:
        """Send, if there is still somebody to read it."""
        with suppress(OSError), self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when there will be no more."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def part(self, seconds: float) -> None:
        """Send no more, and let what was sent arrive: closing with unread input would lose it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(1 << 16):
                    return


#: Bytes in which rank 0 says where it listens, and with which word the others are to come.
_ADDRESS = 1024


def _rendezvous(rank: int, size: int, share: Share, patience: Timeouts) -> dict[int, _Link]:
    """Connections by rank: of rank 0 to all others, of any other rank to rank 0."""
    if rank:
        where = json.loads(share(bytes(_ADDRESS))[0].rstrip(b"\0"))
        return {0: _call(rank, where, patience)}
    word = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=size) as server:
        where = {"hosts": _own_addresses(), "port": server.getsockname()[1], "word": word}
        share(json.dumps(where).encode().ljust(_ADDRESS, b"\0"))
        links: dict[int, _Link] = {}
        deadline = time.monotonic() + patience.connect
        while len(links) < size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(r) for r in range(1, size) if r not in links)
                raise MlxSoraError(f"Rank {missing} did not find rank 0.", NETWORK) from None
            link = _Link(connection)
            hello = link.receive()
            if hello and hello[0].get("word") == word:
                links[int(hello[0]["rank"])] = link
            else:  # a stranger
                connection.close()
        return links


def _call(rank: int, where: dict[str, Any], patience: Timeouts) -> _Link:
    """The connection of `rank` to rank 0, at the first of its addresses that answers."""
    for host in where["hosts"]:
        try:
            connection = socket.create_connection(
                (host, where["port"]), timeout=patience.connect / len(where["hosts"])
            )
        except OSError:
            continue
        link = _Link(connection)
        link.send({"rank": rank, "word": where["word"]})
        return link
    hosts, port = ", ".join(where["hosts"]), where["port"]
    raise MlxSoraError(f"Rank {rank} cannot reach rank 0 at {hosts}, port {port}.", NETWORK)


def _own_addresses() -> list[str]:
    """Where other machines may find this one: what MLX was told, the name's, this machine's own."""
    found = [_from_hostfile()]
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys([address for address in found if address] + ["127.0.0.1"]))[:8]


def _from_hostfile() -> str | None:
    """The address of rank 0 in the host file of MLX's ring, if there is one."""
    with suppress(KeyError, OSError, ValueError, IndexError, TypeError, AttributeError):
        with open(os.environ["MLX_HOSTFILE"], encoding="utf-8") as file:
            hosts = json.load(file)
        return str(hosts[0][0].rpartition(":")[0])
    return None
