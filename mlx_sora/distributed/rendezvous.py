"""Rendezvous of the ranks at rank 0, before and after MLX has connected them.

While MLX connects, no other Python thread runs, and a rank that is gone is waited for. So the ranks
meet first: they ask for rank 0's address by UDP, at the host and port where MLX's backend will
listen for TCP. If that is unknown or blocked, they get it by a collective once MLX has connected.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Datagram that asks rank 0 for its address.
_QUESTION = b"mlx_sora: where is rank 0?"

#: Bytes of a line; who sends more is no rank.
_LONGEST_LINE = 1 << 16


class Connection:
    """Lines of JSON over TCP. rank, pid, host: of the other side, once it has sent them.

    finished: the other side has said that it is done. crash: what Python's faulthandler, which
    writes here when a rank crashes, has said.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.finished, self.crash = connection, False, ""
        self.rank, self.pid, self.host = -1, 0, ""
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(5.0)

    @property
    def is_local(self) -> bool:
        """True if both sides are on one machine."""
        with suppress(OSError):
            own, other = self.socket.getsockname()[0], self.socket.getpeername()[0]
            return bool(own == other)
        return False

    def introduce(self, rank: int, token: str) -> None:
        """Send who this rank is."""
        self.send({"rank": rank, "token": token, "pid": os.getpid(), "host": socket.gethostname()})

    def read_introduction(self, message: dict[str, Any]) -> None:
        """Take over who the other side is."""
        self.rank, self.pid = int(message["rank"]), int(message["pid"])
        self.host = str(message["host"])

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
        if len(self._rest) > _LONGEST_LINE:
            return None
        messages = []
        for line in lines:
            try:
                messages.append(json.loads(line))
            except ValueError:
                text = line.decode(errors="replace").strip()
                self.crash = self.crash or text.removeprefix("Fatal Python error: ")
        return [message for message in messages if isinstance(message, dict)]

    def shut_down(self, seconds: float) -> None:
        """Stop sending and read the rest: closing with unread input would lose what was sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(1 << 16):
                    return


class Rendezvous:
    """Sockets of `rank` for the time until all are connected to rank 0.

    coordinator: "host:port" where MLX's backend will listen on rank 0; empty if unknown. address:
    of rank 0, as plain JSON values; on other ranks None until they know it.
    """

    def __init__(self, rank: int, coordinator: str) -> None:
        self._rank, self._server = rank, None
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        host, _, port = coordinator.rpartition(":")
        self.address: dict[str, Any] | None = None
        #: True if ranks may find each other before MLX has connected them.
        self.is_early = False
        with suppress(OSError, ValueError):
            join = self._datagrams.connect if rank else self._datagrams.bind
            join((host, int(port)))
            self.is_early = True
        if rank == 0:
            self._server = socket.create_server(("", 0), backlog=128)
            port, token = self._server.getsockname()[1], secrets.token_hex(16)
            self.address = {"hosts": _local_addresses(host), "port": port, "token": token}

    def sources(self) -> list[tuple[socket.socket, Callable[[], Connection | None]]]:
        """Return rank 0's sockets, with what to call when one can be read."""
        assert self._server is not None, "rank 0 listens"
        return [(self._server, self._accept), (self._datagrams, self._answer)]

    def _accept(self) -> Connection | None:
        assert self._server is not None, "rank 0 listens"
        with suppress(OSError):
            return Connection(self._server.accept()[0])
        return None

    def _answer(self) -> None:
        with suppress(OSError):
            question, sender = self._datagrams.recvfrom(len(_QUESTION) + 1)
            if question == _QUESTION:
                self._datagrams.sendto(json.dumps(self.address).encode(), sender)

    def find_rank0(self, seconds: float) -> Connection | None:
        """Return the connection to rank 0; None if it is not found within about so long."""
        if self.address is None:
            self._ask(seconds)
        if self.address is None:
            return None
        for host in self.address["hosts"]:
            with suppress(OSError):
                place = host, self.address["port"]
                connection = Connection(socket.create_connection(place, timeout=2.0))
                connection.introduce(self._rank, self.address["token"])
                return connection
        time.sleep(seconds)
        return None

    def _ask(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with suppress(OSError, ValueError):  # refused while nobody listens
            self._datagrams.send(_QUESTION)
            if select.select([self._datagrams], [], [], seconds)[0]:
                self.address = json.loads(self._datagrams.recv(4096))
                return
        time.sleep(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Close the sockets: all ranks are connected."""
        self._datagrams.close()
        if self._server is not None:
            self._server.close()


def _local_addresses(first: str) -> list[str]:
    """Return addresses of this machine: `first`, that of its name, and the loopback."""
    addresses = [first]
    with suppress(OSError):
        addresses += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys([address for address in addresses if address] + ["127.0.0.1"]))[:8]
