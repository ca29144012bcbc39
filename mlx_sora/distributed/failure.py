"""When a rank counts as lost, and how it is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Share of a processor below which a rank counts as idle. Sampling memory takes less than half of
#: it, reading weights at 50 MB/s four times as much.
IDLE_CPU_SHARE = 0.01

#: Share of `Timeouts.busy` that a rank must have computed without a sign of progress to count as
#: one that spins. On a loaded machine a rank that only waits for its turn does not.
BUSY_CPU_SHARE = 1 / 3

#: A rank that is killed with fewer bytes of memory left on its machine may have run out of it.
SCARCE_MEMORY = 1 << 30


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds. interval: between heartbeats. connect: for all to find rank 0.

    silence: a rank is lost after so long without a heartbeat. idle, busy: a rank that others wait
    for hangs after so long without any progress, or with processor time as the only progress; or
    longer if it says so. farewell: for the other side to read why the run ends.
    """

    interval: float = 1.0
    silence: float = 30.0
    idle: float = 30.0
    busy: float = 40.0
    connect: float = 30.0
    farewell: float = 3.0


@dataclass(frozen=True)
class Failure:
    """Reason why a run of several ranks ended: rank at fault and its host, cause, exit code.

    reporter: rank that tells the user.
    """

    rank: int
    cause: str
    exit_code: int = 1
    host: str = ""
    reporter: int = 0

    @classmethod
    def of_other(cls, rank: int, cause: str, host: str = "", exit_code: int = 1) -> Failure:
        """Return the failure of another rank, which does not report it: rank 0, or else rank 1."""
        return cls(rank, cause, exit_code, host, reporter=int(rank == 0))

    def __str__(self) -> str:
        return f"Rank {self.rank}{' on ' * bool(self.host)}{self.host} {self.cause}"


@dataclass
class PeerState:
    """Last known state of a rank; times are those of the heartbeat's clock.

    collectives: number begun. ticks: signs of other work. cpu_seconds: processor time.
    idle, busy: seconds that it may seem idle, or compute, from one sign to the next. memory: bytes
    left on its machine. last_heard: time of the last heartbeat. last_sign: of the last in which
    collectives or ticks grew. last_progress: or processor time. sign_cpu: its processor time then.
    """

    collectives: int = 0
    ticks: int = 0
    cpu_seconds: float = 0.0
    idle: float = 0.0
    busy: float = 0.0
    memory: int | None = None
    last_heard: float = 0.0
    last_progress: float = 0.0
    last_sign: float = 0.0
    sign_cpu: float = 0.0

    def begin(self, now: float) -> None:
        """Begin to judge the rank: it is connected."""
        self.last_heard = self.last_progress = self.last_sign = now

    def record_heartbeat(self, now: float, state: dict[str, Any]) -> None:
        """Update the state. Processor time up to IDLE_CPU_SHARE is no progress."""
        self.last_heard, self.memory = now, state["memory"]
        self.idle, self.busy, cpu_seconds = state["idle"], state["busy"], state["cpu_seconds"]
        enough = self.cpu_seconds + 0.03 + IDLE_CPU_SHARE * (now - self.last_progress)
        if state["collectives"] > self.collectives or state["ticks"] > self.ticks:
            self.collectives, self.ticks = state["collectives"], state["ticks"]
            self.last_sign, self.sign_cpu = now, cpu_seconds
        elif cpu_seconds <= enough:
            return
        self.cpu_seconds, self.last_progress = cpu_seconds, now

    def hang(self, now: float, timeouts: Timeouts) -> str:
        """Return how the rank, for which others wait, hangs; empty if it does not."""
        idle, busy = max(timeouts.idle, self.idle), max(timeouts.busy, self.busy)
        if now - self.last_progress > idle:
            return f"hangs: no progress for {idle:g} s."
        spun = self.cpu_seconds - self.sign_cpu
        if now - self.last_sign > busy and spun > BUSY_CPU_SHARE * busy:
            return f"hangs: it computes for {busy:g} s without progress."
        return ""
