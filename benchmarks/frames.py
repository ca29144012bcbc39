"""Fingerprints of 97 requests, to prove that a refactoring changed no frame.

    python -m benchmarks.frames --out before.json
    python -m benchmarks.frames --compare before.json [--tree CHECKOUT] [--only CASE ...]

Every case of frames.txt runs its commands in its own folder, in processes that import mlx_sora from
CHECKOUT. Recorded are the SHA-256 of the decoded frames, the files, their metadata, every line on
stdout, exit codes, and the flags of all commands; measured values (seconds, bytes) are not. Only
the command line and public names are used. Rounding depends on BLAS and processor: compare on one
machine, with mlx_sora/runtime/_cblas built in every checkout. mp4 encoders are not deterministic,
so that mp4 files compare by mean colours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

TABLE = re.sub(r"\n +", " ", Path(__file__).with_suffix(".txt").read_text()).splitlines()
LINES = dict(line.split(maxsplit=1) for line in TABLE if line and line[0] != "#")
WORDS: dict[str, str] = {}  # what $NAME stands for
for word, text in LINES.items():
    LINES[word] = string.Template(text).safe_substitute(WORDS)
    if word[0] == "$":
        WORDS[word[1:]] = LINES[word]
#: Inputs of cases, and commands of each case.
FILES = {name: text.replace(" | ", "\n") for name, text in LINES.items() if "." in name}
CASES = {name: text for name, text in LINES.items() if name[0] != "$" and "." not in name}
(RED,), (BOX,) = shlex.split(WORDS["RED"]), shlex.split(WORDS["BOX"])

#: Flags that go without --json-events.
QUIET = {"-v", "--quiet", "--help", "--help-all"}

#: Names of values that differ between runs.
MEASURED = {"seconds", "seconds_waited", "peak_memory", "peak_rss", "versions", "resumed", "sha256"}


def python(name: str, *media: str) -> None:
    """Carry out a case of the Python API."""
    from mlx_sora import GenerationRequest, Pipeline

    pipe = Pipeline.from_pretrained("shapes")

    def asked(steps: int = 5, output: str = "f/", **more: Any) -> GenerationRequest:
        return GenerationRequest(RED, seed=1, steps=steps, output=output, **more)

    if name == "call":
        video = pipe(RED, seed=1, steps=4, tdtm=2)
        print(video.num_frames, video.fps, video.save("f_%02d.png"), video.save("a.gif"))
    elif name == "batch":
        sizes = enumerate(((1, 6), (17, 0), (17, 4)))
        tell(pipe.stream_all([asked(s, num_frames=n, output=f"{i}/") for i, (n, s) in sizes]))
    elif name == "masks":
        strategy = "0,0;0,1,-5,5,5,0.5"
        tell(pipe.stream(asked(references=media, mask_strategy=strategy, num_frames=34)))
    elif name == "edit":
        print(pipe.edit(*media, source_prompt=RED, prompt=BOX, steps=3, output="f/").num_frames)
    else:  # closed after step 2 of the last clip
        clips = {"loop": 2, "num_frames": 34} if name == "next-clip" else {"lpl": "adaptive"}
        caches = {"step_cache": "online:threshold=0.3,warmup=2", "guidance_cache": "every:2"}
        request = asked(8, sampler="ab2", checkpoint_every=2, **clips, **caches)
        tell(pipe.stream(request), clips.get("loop", 1))
        tell(pipe.stream(request, resume="f/frame_%05d.png.checkpoint.safetensors"))


def tell(stream: Any, stop: int = 0) -> None:
    """Print events; close the stream when step 2 ends for the `stop`-th time."""
    seen = 0
    for event in stream:
        told = {"event": type(event).__name__} | {
            f.name: getattr(event, f.name) for f in fields(event)
        }
        print(json.dumps(told, default=lambda value: type(value).__name__))
        seen += told["event"] == "StepFinished" and told["step"] == 2
        if seen and seen == stop:
            stream.close()


def run(words: list[str], at: Path, tree: Path, ranks: int = 1, stop: bool = False) -> list[str]:
    """Run a command, on ranks as mlx.launch starts them; return the lines of rank 0."""
    env = os.environ | {"PYTHONPATH": str(tree), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mlx_sora", *words]
    if words[0] == "python":
        command = [sys.executable, __file__, "--python", *words[1:]]
    elif words[0] in ("generate", "edit") and not {"-v", "--quiet", "--help", "--help-all"} & set(
        words
    ):
        command.append("--json-events")
    with tempfile.TemporaryDirectory() as place:
        if ranks > 1:
            sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
            hosts = [["{}:{}".format(*each.getsockname())] for each in sockets]
            for each in sockets:
                each.close()
            env["MLX_HOSTFILE"] = f"{place}/hosts"
            Path(place, "hosts").write_text(json.dumps(hosts))
        running, pipes = [], {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        for rank in range(ranks):
            own = env | ({"MLX_RANK": str(rank)} if ranks > 1 else {})
            with Path(place, str(rank)).open("w") as errors:
                running.append(subprocess.Popen(command, cwd=at, env=own, stderr=errors, **pipes))
        said = []
        for line in running[0].stdout:
            said.append(line.rstrip())
            if stop and '"step_finished", "step": 3,' in line:
                running[0].send_signal(signal.SIGTERM)
        codes = [each.wait() for each in running]
        errors = Path(place, "0").read_text().splitlines()
    if "Traceback (most recent call last):" in errors:
        print(*errors, sep="\n", file=sys.stderr)
    said += [line for line in errors if line.startswith("error:")]
    said = [json.dumps(masked(json.loads(line))) if line[:1] == "{" else line for line in said]
    said = [line.replace(str(at), "FOLDER").replace(str(tree), "TREE") for line in said]
    return [*said, f"exit {codes}"]


def draw(file: Path, count: int) -> None:
    """Write a video of a red circle. Without mbtree, which makes x264 vary on small frames."""
    import av
    import numpy as np

    down, across = np.mgrid[:64, :64]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"x264-params": "mbtree=0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(count):
            inside = (down - 30) ** 2 + (across - 16 - i) ** 2 < 150
            pixels = np.stack([inside * 220, inside * 0, inside * 0], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def masked(value: Any, hidden: bool = False) -> Any:
    """Return JSON values without the measured ones."""
    if isinstance(value, dict):
        return {name: masked(each, hidden or name in MEASURED) for name, each in value.items()}
    if isinstance(value, list):
        return [masked(each, hidden) for each in value]
    return None if hidden else value


def opened(file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the frames and the metadata of a file, if it has them."""
    import av
    import numpy as np
    from PIL import Image, ImageSequence

    from mlx_sora.video.reader import read_video

    frames, text = (), ""
    if file.suffix == ".json":
        text = file.read_text() if '"request":' in file.read_text() else ""
    elif file.suffix == ".mp4":
        with av.open(str(file)) as container:
            text = container.metadata.get("comment")
        frames = read_video(file).frames
    elif file.suffix in (".png", ".gif", ".webp"):
        with Image.open(file) as image:
            text = image.info.get("mlx_sora") or image.info.get("comment")
            text = text or image.getexif().get(0x010E)
            frames = [np.array(each.convert("RGB")) for each in ImageSequence.Iterator(image)]
    return frames, json.loads(text) if text else {}


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value inside objects and lists of objects, with its path."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from flat(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for index, each in enumerate(value):
            yield from flat(each, f"{path}[{index}]")
    else:
        yield path, value


def result(folder: Path, events: list[str]) -> dict[str, Any]:
    """Return the fingerprint of a case; for mp4 the mean colours on a 4 x 4 grid."""
    digest, count, records, colours, keys = hashlib.sha256(), 0, {}, {}, set()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        frames, record = opened(file)
        for frame in frames:
            exact = b"" if file.suffix == ".mp4" else frame.tobytes()
            digest.update(repr(frame.shape).encode() + exact)
            count += 1
        if file.suffix == ".mp4":
            _, height, width, _ = frames.shape
            places = frames.mean(0).reshape(4, height // 4, 4, width // 4, 3).mean((1, 3))
            colours[file.name] = [round(float(each), 1) for each in places.ravel()]
        if record:
            records[file.relative_to(folder).as_posix()] = record
            keys |= {re.sub(r"\[\d+\]", "[]", path) for path, _ in flat(record)}
    return {
        "frames_sha256": digest.hexdigest(),
        "n_frames": count,
        "metadata_keys": sorted(keys),
        "metadata": {name: dict(flat(masked(each))) for name, each in records.items()},
        "files": [file.relative_to(folder).as_posix() for file in files],
        "colours": colours,
        "events": events,
    }


def make(name: str, work: Path, tree: Path, made: dict[str, Any]) -> None:
    """Run a case, after those whose files it uses."""
    text, began, folder, events = CASES[name], time.perf_counter(), work / name, []
    files = {file: content for file, content in FILES.items() if file in text.split()}
    for other in re.findall(r"\.\./([\w-]+)/", text + "".join(files.values())):
        make(other, work, tree, made)
    if name in made:
        return
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(content)
    ranks, stop = 1 + name.startswith("ranks-"), name.startswith("interrupt-")
    for index, words in enumerate(text.split(" && ")):
        words = words if words[0] != "-" else f"{WORDS['MAKE']} {words}"
        said = run(shlex.split(words), folder, tree, ranks, stop and not index)
        events += said[-1:] if stop else said  # which step an interrupt falls into, varies
    made[name] = result(folder, events)
    ended = " ".join(sorted({each for each in events if re.match("exit.*[1-9]", each)}))
    told = "{frames_sha256} {n_frames:4}".format(**made[name])
    print(f"{name:18}{told}{time.perf_counter() - began:5.1f} s {ended}", flush=True)


def flags(tree: Path, *words: str) -> dict[str, list[str]]:
    """Return the option strings of every command."""
    text = "\n".join(run([*words, "--help"], tree, tree))
    if "--help-all" in text:
        text = "\n".join(run([*words, "--help-all"], tree, tree))
    options = " ".join(re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE))
    found = {" ".join(words): sorted(set(re.findall(r"(?<!\S)--?\w[\w-]*", options)))}
    listed = re.search(r"^  [A-Z]+\n((?:    .*\n)+)", text, re.MULTILINE)
    for name in re.findall(r"^    (\w+)", listed[1] if listed else "", re.MULTILINE):
        found |= flags(tree, *words, name)
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield a line for every difference."""
    for name in dict.fromkeys([*before, *now]):
        old, new = dict(flat(before.get(name))), dict(flat(now.get(name)))
        for path in dict.fromkeys([*old, *new]):
            was, made = old.get(path), new.get(path)
            if path.startswith("colours.") and was and made:  # encoders may vary a little
                made = was if all(abs(a - b) < 3 for a, b in zip(was, made, strict=True)) else made
            if was == made:
                continue
            if isinstance(was, list) and isinstance(made, list):
                was, made = [x for x in was if x not in made], [x for x in made if x not in was]
            yield f"{name}: {path}: {str(was)[:400]} -> {str(made)[:400]}"


def main() -> int:
    """Run the cases; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=Path.cwd(), help="checkout; default: here")
    parser.add_argument("--out", type=Path, help="write results as JSON")
    parser.add_argument("--compare", type=Path, help="results of another run to compare with")
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="repeatable")
    parser.add_argument("--python", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.python:
        python(*args.python)
        return 0
    tree, start = args.tree.resolve(), time.perf_counter()
    sys.path.insert(0, str(tree))
    import mlx_sora

    assert tree in Path(mlx_sora.__file__).parents, f"{mlx_sora.__file__} is not of {tree}"
    now = {"machine": mlx_sora.Pipeline.from_pretrained("shapes").info()["machine"], "cases": {}}
    now["flags"] = {f"flags of {name!r}": each for name, each in flags(tree).items()}
    with tempfile.TemporaryDirectory(prefix="frames-") as work:
        for count in (17, 34):
            draw(Path(work, f"{count}.mp4"), count)
        for name in args.only or CASES:
            make(name, Path(work), tree, now["cases"])
    print(f"{len(now['cases'])} cases, {time.perf_counter() - start:.0f} s")
    if args.out:
        args.out.write_text(json.dumps(now, indent=1) + "\n")
    before = json.loads(args.compare.read_text()) if args.compare else now
    if args.only:
        before["cases"] = {name: before["cases"].get(name) for name in now["cases"]}
    found = [line for part in ("cases", "flags") for line in differences(before[part], now[part])]
    found += [] if before["machine"] == now["machine"] else ["another machine or BLAS"]
    print("\n".join(found) or ("no differences" if args.compare else "nothing to compare with"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
