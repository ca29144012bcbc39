"""Measures all tables again whose inputs changed, such as the bundled weights, and renews the rest.

    python -m benchmarks.all --list              what is current, what is not, and why
    python -m benchmarks.all [--only NAME ...] [--force]
    python -m benchmarks.all --record NAME ...   takes results as measured with today's inputs

Each line of the table runs in processes of its own, one after another. One that fails stops no
other; one that ended is not run again, so a command that was stopped goes on where it was.
`measured.json` holds, for each line, a hash of the commands and inputs that its results are from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.common import markdown

ROOT = Path(__file__).parents[1]
STATE = ROOT / "benchmarks" / "measured.json"
RESULTS = "benchmarks/results"
SHAPES = "weights/shapes"
VAE = (f"{SHAPES}/vae/*",)
#: What the videos of the bundled model follow from.
MODEL = (f"{SHAPES}/*/*.safetensors", f"{SHAPES}/*/config.json", f"{SHAPES}/tokenizer/*")
TABLES = (f"{SHAPES}/step_cache/*", f"{SHAPES}/token_merging/*")

#: Captions that the tables of steps and of merging are searched on, one of each motion but one.
CAPTIONS = (
    "a red circle moving right on a black background",
    "a blue square moving up on a white background",
    "a green triangle staying still on a gray background",
    "a yellow circle growing on a navy background",
    "an orange square moving left on a black background",
    "a purple triangle moving down on a white background",
)
CALIBRATE = "-m mlx_sora calibrate --model shapes --overwrite " + " ".join(
    f"-p {shlex.quote(caption)}" for caption in CAPTIONS
)


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    commands: arguments of Python, run in turn; {scratch} is an empty folder. minutes: on two quiet
    cores, roughly. needs: patterns of files that the results follow from; without any, they follow
    from the code and the machine alone. writes: files. rows: it measures no row that its first file
    already has, so that this file is removed when the inputs changed.
    """

    commands: tuple[str, ...]
    minutes: int
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    rows: bool = False


def _measures(
    name: str, minutes: int, needs: tuple[str, ...] = (), words: str = "", rows: bool = False
) -> Entry:
    """Return the line of a module that writes the results of its name."""
    command = f"-m benchmarks.{name}{words and ' '}{words}"
    return Entry((command,), minutes, needs, (f"{RESULTS}/{name}.json",), rows)


#: Name -> line, in the order in which they run: what belongs to the weights, what is measured, and
#: what is made of the results.
TABLE: Mapping[str, Entry] = {
    "preview": Entry(
        ("-m benchmarks.preview",), 15, VAE, (f"{RESULTS}/preview.json", f"{SHAPES}/preview.json")
    ),
    "step_table": Entry((CALIBRATE,), 2, MODEL, (f"{SHAPES}/step_cache/30-steps-64x64-17.json",)),
    "merging_table": Entry(
        (f"{CALIBRATE} --tdtm 1.15",), 3, MODEL, (f"{SHAPES}/token_merging/30-steps-64x64-17.json",)
    ),
    "contact_sheet": Entry(
        (f"-m benchmarks.shapes.contact_sheet {SHAPES}/contact_sheet.png",),
        1,
        MODEL,
        (f"{SHAPES}/contact_sheet.png",),
    ),
    "records": Entry(
        ("-m tests.invariants.bundled",),
        1,
        (*MODEL, *TABLES, f"{SHAPES}/[!ps]*", f"{SHAPES}/preview.json"),
        (f"{SHAPES}/provenance.json", f"{SHAPES}/statistics.json"),
    ),
    # The bundled model: quality, and speed beside it.
    "conditioning": _measures("conditioning", 50, MODEL, rows=True),
    "editing": _measures("editing", 40, MODEL),
    "ondevice": _measures("ondevice", 20, MODEL, "--prompts 16"),
    "ondevice_51": Entry(
        (f"-m benchmarks.ondevice --prompts 8 --frames 51 --json {RESULTS}/ondevice_51.json",),
        30,
        MODEL,
        (f"{RESULTS}/ondevice_51.json",),
    ),
    "ondevice_68": Entry(
        (f"-m benchmarks.ondevice --prompts 8 --frames 68 --json {RESULTS}/ondevice_68.json",),
        40,
        MODEL,
        (f"{RESULTS}/ondevice_68.json",),
    ),
    "leaps": _measures("leaps", 20, MODEL),
    "pareto": _measures("pareto", 60, (*MODEL, *TABLES)),
    "quantized": _measures("quantized", 55, MODEL, rows=True),
    "reflection": _measures("reflection", 180, MODEL, rows=True),
    "samplers": _measures("samplers", 25, MODEL),
    "tdtm": Entry(
        ("-m benchmarks.tdtm", "-m benchmarks.tdtm --speeds"),
        30,
        (*MODEL, *TABLES),
        (f"{RESULTS}/tdtm.json",),
        rows=True,
    ),
    "text_by_time": _measures("text_by_time", 30, MODEL, rows=True),
    "tiles": _measures("tiles", 10, MODEL, "--prompts 5 --frames 2"),
    "vae_dtype": _measures("vae_dtype", 10, MODEL, "--prompts 3 --frames 2"),
    # Speed and memory, whatever the weights are.
    "blas": Entry(
        (f"-m benchmarks.blas --json {RESULTS}/blas.json",), 1, (), (f"{RESULTS}/blas.json",)
    ),
    "kernels": _measures("kernels", 10),
    "savings": _measures("savings", 5),
    "startup": _measures("startup", 1),
    "serve": _measures("serve", 5, (), f"--json {RESULTS}/serve.json"),
    "distributed": _measures("distributed", 8),
    "clusters": _measures("clusters", 1),
    "ondevice_full": _measures("ondevice_full", 40, (), "--depth 2"),
    "step_cache_full": _measures("step_cache_full", 20),
    "streaming": _measures("streaming", 20, (), "--depth 4"),
    "text_cache": _measures("text_cache", 10),
    "estimates": _measures("estimates", 30),
    "refine": _measures("refine", 2),
    "fullsize": _measures("fullsize", 40),
    "memory": Entry(
        ("-m benchmarks.full_model {scratch}/full", "-m benchmarks.memory {scratch}/full"),
        60,
        (),
        (f"{RESULTS}/memory.json",),
        rows=True,
    ),
    "quantized_full": Entry(
        ("-m benchmarks.quantized --full-size {scratch}/full",),
        15,
        (),
        (f"{RESULTS}/quantized.json",),
    ),
    "faults": Entry(
        (f"-m pytest -n 0 -m longrun --faults {RESULTS}/faults.json",),
        240,
        (),
        (f"{RESULTS}/faults.json",),
    ),
    # Made of the results.
    "plots": Entry(("-m benchmarks.plots",), 1, (f"{RESULTS}/*.json",), (f"{RESULTS}/*.png",)),
    "pictures": Entry(("-m benchmarks.pictures",), 3, MODEL, (f"{RESULTS}/pictures/*",)),
    "faults_table": Entry(("-m tests.longrun.table",), 1, (f"{RESULTS}/faults.json",)),
    "figures": Entry(("-m benchmarks.figures",), 1, (f"{RESULTS}/*.json",)),
    "readme": Entry(("-m tests.invariants.readme",), 1, (f"{RESULTS}/*.json",)),
}

#: Modules that measure nothing for a table: helpers, tools, and studies that print.
TOOLS = ("all", "blas_threads", "common", "frames", "full_model", "quantized_weights", "studies")
#: Results that come from campaigns of their own: `python -m tests.fuzz`.
CAMPAIGNS = ("fuzz",)


def fingerprint(entry: Entry, root: Path = ROOT) -> str:
    """Return a hash of the commands of a line and of the contents of what it needs."""
    found = hashlib.sha256("\n".join(entry.commands).encode())
    for pattern in entry.needs:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                found.update(path.relative_to(root).as_posix().encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


@dataclass
class State:
    """Name of a line -> fingerprint: of those that ended well, and of those that began."""

    path: Path
    done: dict[str, str] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        """Return what a file holds; without one, nothing was measured."""
        if not path.exists():
            return cls(path)
        found = json.loads(path.read_text("utf-8"))
        return cls(path, found["done"], found["begun"])

    def begin(self, name: str, found: str) -> bool:
        """Note that a line is measured; return True if it goes on with the same inputs."""
        goes_on = self.begun.get(name) == found
        self.done.pop(name, None)
        self.begun[name] = found
        self._write()
        return goes_on

    def end(self, name: str, found: str) -> None:
        """Note that a line is measured with these inputs."""
        self.begun.pop(name, None)
        self.done[name] = found
        self._write()

    def _write(self) -> None:
        result = {"done": self.done, "begun": self.begun}
        self.path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Campaign:
    """A table of lines, and what was measured of it under `root`."""

    table: Mapping[str, Entry]
    state: State
    root: Path = ROOT

    def reason(self, name: str) -> str:
        """Return why a line has to run; empty if its results are current."""
        entry = self.table[name]
        missing = [f for f in entry.writes if not any(self.root.glob(f))]
        if name in self.state.begun:
            return "was interrupted or failed"
        if missing:
            return f"{missing[0]} is missing"
        if name not in self.state.done:
            return "never recorded"
        return "" if self.state.done[name] == fingerprint(entry, self.root) else "inputs changed"

    def reasons(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield each line with its reason, that of later lines as if the earlier ones had run."""
        renewed: dict[str, str] = {}
        for name in names:
            needs = self.table[name].needs
            after = [o for f, o in renewed.items() if any(fnmatch(f, need) for need in needs)]
            reason = self.reason(name) or (f"follows from {after[0]}" if after else "")
            if reason:
                renewed |= dict.fromkeys(self.table[name].writes, name)
            yield name, reason

    def run(self, names: Sequence[str], force: bool = False) -> list[str]:
        """Run the lines that are not current, or all of them; return the names that failed."""
        failed = []
        for name in names:
            reason = "--force" if force else self.reason(name)
            if not reason:
                continue
            print(f"== {name}: {reason}, about {self.table[name].minutes} min", flush=True)
            if not self._measure(name, anew=force):
                failed.append(name)
                print(f"== {name} failed", flush=True)
        return failed

    def record(self, names: Sequence[str]) -> None:
        """Take the results of lines as measured with the inputs of now."""
        for name in names:
            self.state.end(name, fingerprint(self.table[name], self.root))

    def _measure(self, name: str, anew: bool) -> bool:
        entry = self.table[name]
        inputs = fingerprint(entry, self.root)
        goes_on = self.state.begin(name, inputs) and not anew
        if entry.rows and not goes_on:
            (self.root / entry.writes[0]).unlink(missing_ok=True)
        paths = [str(self.root), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with tempfile.TemporaryDirectory() as scratch:
            for command in entry.commands:
                words = shlex.split(command.replace("{scratch}", scratch))
                line = [sys.executable, *words]
                if subprocess.run(line, cwd=self.root, env=env, check=False).returncode:
                    return False
        self.state.end(name, inputs)
        return True

    def show(self, names: Sequence[str]) -> str:
        """Return a table: why each line has to run, and the sum of the minutes."""
        rows = [
            (name, reason or "current", str(self.table[name].minutes) if reason else "")
            for name, reason in self.reasons(names)
        ]
        total = sum(int(minutes or 0) for *_, minutes in rows)
        return markdown(["line", "state", "minutes"], [*rows, ("all", "", str(total))])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = {"nargs": "+", "choices": list(TABLE), "metavar": "NAME"}
    parser.add_argument("--only", default=list(TABLE), help="only these lines", **names)
    parser.add_argument("--force", action="store_true", help="run current lines, too")
    parser.add_argument("--list", "--dry-run", action="store_true", help="run nothing")
    parser.add_argument("--record", help="take these results as current, run nothing", **names)
    options = parser.parse_args()
    campaign = Campaign(TABLE, State.read(STATE))
    wanted = [name for name in TABLE if name in options.only]
    if options.record:
        campaign.record(options.record)
        return 0
    if options.list:
        print(campaign.show(wanted))
        return 0
    failed = campaign.run(wanted, options.force)
    if failed:
        print(f"failed: {' '.join(failed)}. If results count: python -m benchmarks.all --record")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
