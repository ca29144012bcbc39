"""Small valid inputs of every reader, for fuzzing to start from."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_sora.loading.model_folder import BUNDLED, find_model


def _json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _row(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def headers() -> list[bytes]:
    """Headers of 96 bytes of tensors."""
    two = {"a": _row("F32", [4, 4], 0, 64), "b.weight": _row("BF16", [16], 64, 96)}
    return _json(
        two,
        {"__metadata__": {"format": "mlx"}, **two},
        {"x": _row("U32", [6, 4], 0, 96)},
        {"x": _row("F32", [0], 0, 0), "y": _row("I64", [12], 0, 96)},
        {"s": _row("F32", [], 0, 4), "t": _row("U8", [92], 4, 96)},
    )


def safetensors() -> list[bytes]:
    """Whole files."""
    return [struct.pack("<Q", len(h)) + h + bytes(range(96)) for h in headers()]


def shards() -> dict[str, bytes]:
    """Two files that an index may name."""
    rows = {"a": {"x": _row("F32", [2], 0, 8)}, "b": {"y": _row("F32", [2], 0, 8)}}
    texts = {name: json.dumps(row).encode() for name, row in rows.items()}
    return {
        f"{name}.safetensors": struct.pack("<Q", len(t)) + t + bytes(8) for name, t in texts.items()
    }


def indexes() -> list[bytes]:
    """Indexes of `shards`."""
    good = {"x": "a.safetensors", "y": "b.safetensors"}
    return _json(
        {"metadata": {"total_size": 16}, "weight_map": good},
        {"weight_map": good | {"z": "../a.safetensors"}},
        {"weight_map": good | {"z": "pytorch_model.bin"}},
    )


def configs(part: str) -> list[bytes]:
    """config.json of the bundled model."""
    content = json.loads((find_model(BUNDLED).path / part / "config.json").read_text())
    return _json(content, content | {"quantization": {"bits": 8, "group_size": 64}})


def model_indexes() -> list[bytes]:
    """model_index.json of the bundled model."""
    return [(find_model(BUNDLED).path / "model_index.json").read_bytes(), b"{}"]


def provenances() -> list[bytes]:
    """provenance.json of a download and of a conversion."""
    row = {"repo": "a/b", "revision": "0" * 40, "name": "c.json", "bytes": 3, "sha256": "0" * 64}
    plain = {"format": 1, "model": "opensora-1.2", "endpoint": "e", "files": {"vae/c.json": row}}
    how = {"bits": 8, "group_size": 64}
    conversion = {"source": "/tmp", "dtype": None, "quantization": how, "fingerprint": "f"}
    gptq = {"prompts": ["a red circle", "x"], "steps": 10, "distill": 2}
    return _json(
        plain,
        plain | {"conversion": conversion},
        plain | {"conversion": conversion | {"gptq": gptq}},
    )


def statistics() -> list[bytes]:
    """statistics.json of a model with one tensor in each part."""
    row = {"dtype": "F32", "shape": [2, 2], "sha256": "0" * 64, "rms": 1.5, "kurtosis": 2.0}
    row |= {"constant_rows": 0, "sums": [1.0] * 16}
    parts = {part: {"a.weight": row} for part in ("text_encoder", "transformer", "vae")}
    settings = {"vae/config.json": "0" * 64, "tokenizer/spiece.model": "1" * 64}
    return _json({"format": 1, "settings": settings, "tensors": parts})


def foreign_words() -> list[bytes]:
    """Names and texts that a shell would read in another way than they are meant."""
    return [
        *(b"a b", b"$(id)", b"`id`", b"; id #", b"' ; id ; '", b"'; id; '" * 40, b"\\", b"\n id"),
        *(b"~", b"--help", b"Repair: id", b" Repair: id", b"&& id", b"a" * 400 + b"' & id", b"*"),
        *("\u2028; id".encode(), "\u00e9' id".encode(), b"!!", b"\x1b[2J", b"'" * 99, b"x{a,b}"),
    ]


def _field(number: int, value: bytes | int | float) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, bytes):
        return bytes([number << 3 | 2]) + _varint(len(value)) + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def spiece(charsmap: bytes = b"") -> bytes:
    """A SentencePiece model with the special tokens of T5 and a few pieces."""
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    words = ("\u2581", "\u2581a", "red", "circle", ",", "m", "o", "v", "i", "n", "g", "right", "!")
    pieces += [(word, -1.0 - n / 8, 1) for n, word in enumerate(words)]
    out = b""
    for text, score, kind in pieces:
        out += _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind))
    ids = b"".join(_field(n, i) for n, i in ((3, 1), (40, 2), (42, 1)))
    ids += _varint(41 << 3) + _varint((1 << 64) - 1) + _field(43, 0)  # no bos
    return out + _field(2, ids) + _field(3, _field(1, b"x") + _field(2, charsmap))


def spieces() -> list[bytes]:
    """Tokenizer models, one with the character map of T5's (cut, as it is large)."""
    whole = find_model(BUNDLED).tokenizer.read_bytes()
    at = whole.rfind(b"nmt_nfkc")
    return [spiece(), spiece(struct.pack("<I", 16) + bytes(16) + b"a\0b\0"), whole[at - 8 :][:4096]]


def prompts() -> list[bytes]:
    """Prompts with every kind of syntax."""
    texts = (
        "a red circle moving right on a black background",
        '|0|a village|2|spring comes{"reference_path": "a.png", "mask_strategy": "0"}',
        "visit https://example.com/a-b and www.a.org, <b>b</b> &amp; 中文 \u00e9 #123 1.2.3.4",
        'this-is-my-cute-cat jc6640vc 640x480 a.png page 3 "quoted" <person> 12:30 ',
        'a.a.a.a.a.a <a <a <a b="1" <!-- x &lt;p&gt; %3Cb%3E',
        "AAAA \uff1cpad\uff1e </s> <extra_id_3> \u00a0\u3000 e\u0301 \U0001f3ac",
    )
    return [text.encode() for text in texts]


def pieces() -> list[bytes]:
    """What to repeat."""
    texts = ("a.", "a-", "1.", "www.", "<a ", "<!--", ".png ", "&a;", "a ", '<a b="', "free ", "x1")
    return [text.encode() for text in texts]


def strategies() -> list[bytes]:
    """Mask strategies."""
    return [b"0", b"0,0,0,0,8,0.3;0,1,0,8", b"1,1,-5,0,5;2,2,-1,0,1,0.5", b"0;1,1"]


def options() -> list[bytes]:
    """Objects of options."""
    return _json(
        {"prompt": "a", "steps": 30, "guidance": 7.0, "seed": 3, "num_frames": 34, "fps": 24},
        {"prompt": "a", "resolution": "240p", "aspect_ratio": "9:16", "num_frames": "2s"},
        {"prompt": "a", "width": 64, "height": 64, "loop": 3, "num_frames": 34, "motion": 3},
        {"prompt": '|0|a|2|b{"mask_strategy": "1,0"}', "loop": 3, "camera": "pan", "model": None},
        {"prompt": "a", "lpl": "fixed:15", "tdtm": 3, "step_cache": "every:4,order=1"},
        {
            "prompt": "a",
            "images": ["a.png", ["b.png", "last", 0.5]],
            "videos": [["c.mp4", "after"]],
        },
        {"prompt": "a", "mask_strategy": "0", "references": ["a.png"], "negative_prompt": "b"},
        {
            "prompt": "a",
            "memory_budget": "3.3GB",
            "output": "{seed}-{index:03d}.mp4",
            "quantize": 8,
        },
        {"prompt": "a", "guidance_cache": "every:5,after=0.5", "guidance_interval": "300,1000"},
    )


def words() -> list[bytes]:
    """Values of single options."""
    texts = ("a", "30", "2s", "16:9", "720p", "3.3GB", "every:4,warmup=6,order=0", "adaptive")
    more = ("table:8,file=a.json", "{seed}_%04d.png", "out/", "vae=a/b@main:sub", "http://a:1/b")
    return [text.encode() for text in (*texts, *more)]


def prompt_files() -> list[bytes]:
    """JSONL batches."""
    lines = [option.decode() for option in options()]
    return [("\n".join(lines[:3])).encode(), *[line.encode() for line in lines]]


def records() -> list[bytes]:
    """Metadata as it is written."""
    request = {"prompt": "a", "seed": 1, "images": [["a.png", 0, 1.0]], "fps": 24.0}
    settings = {"model": "shapes", "steps": 30, "guidance": 2.0, "width": 64, "height": 64}
    media = [{"path": "a.png", "sha256": "0" * 64, "size": "64x64", "num_frames": 1}]
    record = {"request": request, "settings": settings | {"media": media}, "warnings": []}
    return _json(record, {"request": {"prompt": "a"}}, record | {"edit": {}})


def media(suffix: str) -> list[bytes]:
    """A small file that we wrote, with its record."""
    import numpy as np

    from mlx_sora.video.writer import save_frames

    frames = np.zeros((1 if suffix == ".png" else 3, 16, 16, 3), np.uint8)
    with TemporaryDirectory() as folder:
        record = {"request": {"prompt": "a", "seed": 1}}
        path = save_frames(Path(folder) / f"a{suffix}", frames, 24, record)
        return [path.read_bytes()]


def pictures() -> list[bytes]:
    """A picture of every format and of several modes."""
    from PIL import Image

    found = []
    cases = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    cases += [(kind, "RGB") for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    for kind, mode in cases:
        out = BytesIO()
        Image.new(mode, (9, 7), 1).save(out, kind)
        found.append(out.getvalue())
    turned, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7)).save(turned, "JPEG", exif=exif)
    return [*found, turned.getvalue()]


def videos() -> list[bytes]:
    """mp4, mkv, webm, avi, and animated pictures."""
    import av
    import numpy as np
    from PIL import Image

    found = media(".mp4") + media(".gif")
    shades = [Image.new("RGB", (9, 7), (40 * shade, 0, 0)) for shade in range(4)]
    for kind in ("GIF", "PNG", "WEBP"):
        moving = BytesIO()
        shades[0].save(moving, kind, save_all=True, append_images=shades[1:], duration=[40, 90] * 2)
        found.append(moving.getvalue())
    for kind, codec in (("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")):
        out = BytesIO()
        with av.open(out, "w", format=kind) as container:
            stream: Any = container.add_stream(codec, rate=24)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for _ in range(3):
                picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        found.append(out.getvalue())
    return found


def tables() -> list[bytes]:
    """Schedules of a step cache."""
    path = next((find_model(BUNDLED).path / "step_cache").glob("*.json"))
    small = json.loads(path.read_text())
    small["orders"] = {"0": {"8": [0, 1, 2, 3, 4, 10, 20, 29]}}
    return [json.dumps(small).encode()]


def merging_tables() -> list[bytes]:
    """Tables of token merging."""
    path = next((find_model(BUNDLED).path / "token_merging").glob("*.json"))
    small = json.loads(path.read_text())
    small["parts"] = small["parts"][:8]
    return [json.dumps(small).encode()]


def checkpoints() -> list[bytes]:
    """Records of checkpoints."""
    record = {
        "request": {"prompt": "a", "seed": 1, "steps": 4},
        "identity": {"model": "shapes", "weights": "0" * 64, "steps": 4},
        "output": "a.mp4",
        "finished": [],
        "accounts": [],
        "latents": {"$tensor": "run.latents"},
        "steps": 2,
        "state": {"x": {"$tensor": "run.state.x"}},
        "warnings": [],
        "resumed": [{"clip": 0, "step": 1}],
        "versions": {"mlx": "0"},
    }
    return _json(record, record | {"output": "../../a.mp4"})


def listings() -> list[bytes]:
    """The hub's answer, as JSON."""
    lfs = {"sha256": "0" * 64, "size": 5, "pointerSize": 130}
    siblings = [
        {"rfilename": "config.json", "size": 2, "blobId": "0" * 40},
        {"rfilename": "model.safetensors", "size": 5, "blobId": "1" * 40, "lfs": lfs},
    ]
    sharded = [
        siblings[0],
        {"rfilename": "m.safetensors.index.json", "size": 2, "blobId": "2" * 40},
        *({**siblings[1], "rfilename": f"m-0000{n}-of-00002.safetensors"} for n in (1, 2)),
    ]
    base = {"id": "a/b", "sha": "0" * 40, "private": False, "downloads": 0, "likes": 0, "tags": []}
    hostile = [{**siblings[0], "rfilename": "../config.json"}]
    return _json(*({**base, "siblings": each} for each in (siblings, sharded, hostile)))
