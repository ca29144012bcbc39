"""Which programs a shell starts, and with which words, for commands that somebody types."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_sora.errors import NO_WORD

#: Programs that advice names, as functions that say name and words. Then a restricted shell: what
#: escapes from its quotes can start nothing, leave the folder nowhere and write no file.
SCRIPT = """
for program in git mv pip python sips; do
    eval "$program() { printf '%s\\0' $program \\"\\$@\\"; printf '\\n'; }"
done
enable -n kill suspend
PATH=/nowhere
set -r
for command in "$@"; do eval "$command"; printf '\\f\\n'; done
"""

#: A command, and name and words of each program that it is to start.
Typed = tuple[str, Sequence[Sequence[str]]]


def started_programs(commands: Sequence[str], folder: Path) -> list[list[list[str]]]:
    """Return name and words of the programs that bash starts for each command."""
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "--norc", "--noprofile", "-c", SCRIPT, "bash", *commands],
        cwd=folder,
        env={"LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )
    if done.returncode or done.stderr:
        raise AssertionError(f"bash: {done.stderr[:200]!r} for {commands!r}")
    return [
        [os.fsdecode(line).split("\0")[:-1] for line in output.split(b"\n")[:-1]]
        for output in done.stdout.split(b"\f\n")[:-1]
    ]


def check_typed(typed: Sequence[Typed], folder: Path) -> None:
    """Raise AssertionError unless bash starts the expected programs with the expected words.

    NO_WORD may stand for a word that is long or cannot be printed.
    """
    found = started_programs([command for command, _ in typed], folder)
    for (command, expected), programs in zip(typed, found, strict=True):
        same = len(programs) == len(expected) and all(
            len(words) == len(others) and all(map(_is_word, words, others))
            for words, others in zip(programs, expected, strict=True)
        )
        if not same:
            raise AssertionError(f"{command!r} starts {programs!r}, not {expected!r}")


def _is_word(found: str, expected: str) -> bool:
    hard = not expected.isprintable() or len(expected) > 60
    return found == expected or (hard and found == NO_WORD)


def type_advice(data: bytes, folder: Path) -> None:
    """Text of a record and names of files in what is advised to type, as a shell takes it."""
    from mlx_sora.cli.doctor import _line
    from mlx_sora.errors import UsageError
    from mlx_sora.manage.doctor import repair_command
    from mlx_sora.manage.provenance import Provenance
    from mlx_sora.manage.records import Diagnostic
    from mlx_sora.utils.json import lfs_command
    from mlx_sora.video.containers import jpeg_command

    def repair(source: str) -> str:
        record: dict[str, Any] = {"source": source, "dtype": None, "quantization": None}
        record["gptq"] = {"prompts": [text], "steps": 3}
        Provenance(text, text, {}, record).write(folder)
        return repair_command(folder)

    text = data.decode("utf-8", "replace").replace("\0", "")
    path = folder / f"x{text}"
    line = _line(Diagnostic("error", text, text, "python -m mlx_sora"))
    typed: list[Typed] = [
        (UsageError(text, lfs_command(path / "a")).fix, [["git", "-C", str(path), "lfs", "pull"]]),
        (
            UsageError(text, jpeg_command(path)).fix,
            [["sips", "-s", "format", "jpeg", str(path), "--out", "picture.jpg"]],
        ),
        (line.partition("Repair: ")[2], [["python", "-m", "mlx_sora"]]),
    ]
    if repair(f"/nowhere/{text}") != repair("/nowhere") or repair(f"x{text}") != repair("/nowhere"):
        raise AssertionError(f"text of a record in {repair(f'/nowhere/{text}')!r}")
    with suppress(OSError):  # no name of a folder
        source = folder.resolve() / f"y{text.replace('/', '_')}"
        source.mkdir(exist_ok=True)
        words = ["convert", str(source), str(folder), "--gptq", "--steps", "3"]
        words += [f"--prompt={text}", "--check", "--overwrite"]
        typed.append((repair(str(source)), [["python", "-m", "mlx_sora", *words]]))
    check_typed(typed, folder)
