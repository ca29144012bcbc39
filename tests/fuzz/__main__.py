"""`python -m tests.fuzz TARGET --runs N`: fuzz one reader, guided by coverage (atheris).

Findings go to tests/fuzz/corpus/TARGET, where the ordinary suite replays them; a line of JSON at
the end tells what was done. Needs `pip install -e ".[fuzz]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help="`list` names all")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=0, help="at most; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=CORPUS, help="folder that takes them")
    args = parser.parse_args()

    import atheris

    # Everything of ours must be imported under instrumentation, and once.
    with atheris.instrument_imports(include=["mlx_sora"]):
        from tests.fuzz import preload  # noqa: F401
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.verdict import judge

    if args.target not in TARGETS:
        print("\n".join(TARGETS))
        return 0 if args.target == "list" else 2
    target, found, started = TARGETS[args.target], {}, time.monotonic()
    state = {"runs": 0}

    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder, seeds = Path(name) / "files", Path(name) / "seeds"
        folder.mkdir()
        seeds.mkdir()
        for number, seed in enumerate(target.seeds()):
            (seeds / str(number)).write_bytes(seed)
        for old in (CORPUS / args.target).glob("*"):
            (seeds / old.name).write_bytes(old.read_bytes())

        def once(data: bytes) -> None:
            state["runs"] += 1
            verdict = judge(target.run, data, folder)
            if verdict is not None and verdict.kind not in found:
                found[verdict.kind] = verdict.detail
                keep(args.findings / args.target, verdict.kind, data)
                print(f"FINDING {verdict.kind}: {verdict.detail}", file=sys.stderr, flush=True)
            if state["runs"] >= args.runs or 0 < args.seconds < time.monotonic() - started:
                finish()

        def finish() -> None:
            raise KeyboardInterrupt

        def mutate(data: bytes, limit: int, seed: int) -> bytes:
            # One in four by libFuzzer itself, which adds what it saw our code compare with.
            if seed % 4 == 0:
                return bytes(atheris.Mutate(data, limit))
            return target.mutate(data, limit, seed)

        flags = [sys.argv[0], str(seeds), f"-seed={args.seed}", f"-max_len={target.limit}"]
        flags += [f"-runs={args.runs}", "-timeout=60", "-rss_limit_mb=4000", "-print_final_stats=1"]
        if args.seconds:
            flags.append(f"-max_total_time={args.seconds}")
        atheris.Setup(flags, once, custom_mutator=mutate, internal_libfuzzer=True)
        record: dict[str, Any] = {"target": args.target, "engine": f"atheris"}
        atheris.Fuzz()
    return 0


def keep(folder: Path, kind: str, data: bytes) -> None:
    """Put a finding into the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}-{sha256(data).hexdigest()[:8]}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
