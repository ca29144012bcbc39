"""`python -m tests.fuzz TARGET --runs N`: fuzz one reader, guided by coverage (atheris).

Findings go to tests/fuzz/corpus/TARGET, where the ordinary suite replays them; a line of JSON at
the end tells what was done. `python -m tests.fuzz list` names the targets. Needs
`pip install -e ".[fuzz]"`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.verdict import MAX_LEAK, judge, leak

CORPUS = Path(__file__).parent / "corpus"

#: Seconds of one execution after which the process is ended, and its memory in MB.
TIMEOUT, MEMORY = 120, 4000

#: Most inputs that are run again to see what executions leave on the heap.
REPLAYED = 300


def main() -> int:
    """Start the fuzzer in a process of its own, and tell how that ended."""
    args = parser().parse_args()
    if args.replay:
        return replay(args)
    if args.folder is not None:
        fuzz(args)
    from tests.fuzz.targets import TARGETS

    if args.target not in TARGETS:
        print("\n".join(TARGETS))
        return 0 if args.target == "list" else 2
    started, lines = time.monotonic(), []
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--folder", folder]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as child:
            assert child.stderr is not None
            for line in child.stderr:
                lines.append(line)
                if args.verbose or line.startswith("FINDING"):
                    print(line, end="", file=sys.stderr)
        growth = measure_leak(args.target, Path(folder) / "seeds")
        if not growth <= MAX_LEAK:  # nor a number, where the inputs could not be run again
            lines.append(f"FINDING leak: {growth:.0f} bytes an execution\n")
            print(lines[-1], end="", file=sys.stderr)
        for crash in sorted(Path(folder).glob("*-*")):  # the process itself fell over this
            kind = crash.name.split("-")[0]
            keep(args.findings / args.target, kind, crash.read_bytes())
            lines.append(f"FINDING {kind}: told by the fuzzer itself\n")
            print(lines[-1], end="", file=sys.stderr)
    text = "".join(lines)
    runs = re.findall(r"number_of_executed_units: (\d+)", text) or re.findall(r"#(\d+)\t", text)
    edges = re.findall(r"cov: (\d+)", text)
    record = {
        "target": args.target,
        "engine": "atheris",
        "executions": int(runs[-1]) if runs else 0,
        "seconds": round(time.monotonic() - started, 1),
        "edges": int(edges[-1]) if edges else None,
        "leak": round(growth, 1),
        "findings": [line.split()[1].rstrip(":") for line in lines if line.startswith("FINDING")],
        "exit_code": child.returncode,
    }
    print(json.dumps(record))
    return child.returncode


def measure_leak(target: str, inputs: Path) -> float:
    """Return the bytes that an execution leaves, over inputs that fuzzing found, in a process."""
    command = [sys.executable, "-m", "tests.fuzz", target, "--folder", str(inputs), "--replay"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(made.stdout or "nan")


def replay(args: argparse.Namespace) -> int:
    """Print the bytes that an execution leaves on the heap."""
    from tests.fuzz.targets import TARGETS

    inputs = [path.read_bytes() for path in sorted(args.folder.iterdir())]
    step = -(-len(inputs) // REPLAYED)
    with TemporaryDirectory() as folder:
        print(leak(TARGETS[args.target].run, inputs[::step], Path(folder)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    made.add_argument("target", metavar="TARGET")
    made.add_argument("--runs", type=int, default=100_000, metavar="N")
    made.add_argument("--seconds", type=int, default=0, metavar="N", help="at most; 0: no limit")
    made.add_argument("--seed", type=int, default=1, metavar="N")
    made.add_argument("--findings", type=Path, default=CORPUS, help="folder that takes them")
    made.add_argument("--verbose", action="store_true", help="what the fuzzer says")
    made.add_argument("--replay", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def fuzz(args: argparse.Namespace) -> None:
    """The fuzzer itself, which ends this process."""
    import atheris

    with atheris.instrument_imports(include=["mlx_sora"]):
        from tests.fuzz.targets import TARGETS, import_all

        import_all()
    target, kinds = TARGETS[args.target], set[str]()
    files, seeds = args.folder / "files", args.folder / "seeds"
    files.mkdir()
    seeds.mkdir()
    known = [path.read_bytes() for path in sorted((CORPUS / args.target).glob("*"))]
    for number, seed in enumerate([*target.seeds(), *known]):
        (seeds / f"{number:04}").write_bytes(seed)

    def once(data: bytes) -> None:
        verdict = judge(target.run, data, files, target.seconds)
        if verdict is not None and verdict.kind not in kinds:
            kinds.add(verdict.kind)
            keep(args.findings / args.target, verdict.kind, data)
            detail = " ".join(verdict.detail.split())
            print(f"\nFINDING {verdict.kind}: {detail}", file=sys.stderr, flush=True)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        # One in four by libFuzzer itself, which puts in what it saw our code compare with.
        made = atheris.Mutate(data, limit) if seed % 4 == 0 else target.mutate(data, limit, seed)
        return bytes(made)

    flags = [sys.argv[0], str(seeds), f"-seed={args.seed}", f"-max_len={target.limit}"]
    flags += [f"-runs={args.runs}", f"-max_total_time={args.seconds}", "-print_final_stats=1"]
    flags += [f"-timeout={TIMEOUT}", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={args.folder}/"]
    atheris.Setup(flags, once, custom_mutator=mutate)
    atheris.Fuzz()


def keep(folder: Path, kind: str, data: bytes) -> None:
    """Put a finding into the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}-{sha256(data).hexdigest()[:8]}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
