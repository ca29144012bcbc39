"""Second readers: what a reader of ours accepts must mean the same to another one.

Where a library reads the same format, it is that library; else a few lines that follow the format's
specification and share no code with the package.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any


class WrongAcceptanceError(AssertionError):
    """An input was accepted that another reader refuses or understands differently."""


def agree(subject: str, ours: object, theirs: object) -> None:
    """Raise WrongAcceptanceError unless two readings of `subject` are equal."""
    if ours != theirs:
        raise WrongAcceptanceError(f"{subject}: {str(ours)[:90]!r} against {str(theirs)[:90]!r}")


def safetensors_file(data: bytes, tensors: Mapping[str, Any]) -> dict[str, bytes]:
    """Compare a header with the safetensors library's reading; return the bytes of each tensor."""
    import safetensors

    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if header.get("__metadata__", 0) is None:  # MLX writes null, the library wants none
        del header["__metadata__"]
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    try:
        rows = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise WrongAcceptanceError(f"safetensors refuses it: {error}") from None
    agree("names", sorted(tensors), sorted(rows))
    for name, info in tensors.items():
        row = rows[name]
        agree(name, (info.dtype, list(info.shape)), (row["dtype"], list(row["shape"])))
        agree(f"size of {name}", info.nbytes, len(row["data"]))
    return {name: bytes(row["data"]) for name, row in rows.items()}


def index_file(data: bytes, tensors: Mapping[str, Any], shards: Mapping[str, bytes]) -> None:
    """Compare the tensors of an index with its text: each lies in the shard that it names."""
    weights = json.loads(data)["weight_map"]
    agree("names", sorted(tensors), sorted(weights))
    for name, info in tensors.items():
        agree(f"shard of {name}", info.file.name, weights[name])
        length = struct.unpack("<Q", shards[info.file.name][:8])[0]
        header = json.loads(shards[info.file.name][8 : 8 + length])
        agree(f"shape of {name}", list(info.shape), header[name]["shape"])


def same_values(subject: str, instance: Any, values: Mapping[str, Any]) -> None:
    """Compare each field of a dataclass that `values` has, as JSON knows it."""
    for name in (each.name for each in fields(instance)):
        if name in values:
            ours, theirs = getattr(instance, name), values[name]
            agree(f"type of {name}", isinstance(ours, bool), isinstance(theirs, bool))
            agree(name, list(ours) if isinstance(ours, tuple) else ours, theirs)


def mask(text: str, lengths: Sequence[int], frames: int, clip: int, unit: int) -> list[float]:
    """Return the mask of one clip, frame by frame: 1 where nothing is taken over."""
    out = [1.0] * frames
    for group in text.split(";") if text else ():
        given = group.split(",")
        numbers = [int(field) for field in given[:5]] + [0, 0, 0, 0, 1][len(given) :]
        loop, reference, start, target, count = numbers
        if loop != clip:
            continue
        length = lengths[reference]
        start, target = _aligned(start, unit, length), _aligned(target, unit, frames)
        for index in range(min(count, frames - target, length - start)):
            out[target + index] = float(given[5]) if len(given) > 5 else 0.0
    return out


def _aligned(position: int, unit: int, limit: int) -> int:
    """Return the nearest multiple of `unit` that leaves a whole unit before `limit`."""
    position += limit if position < 0 else 0
    below = position - position % unit
    above = below + unit
    return above if above - position < position - below and above + unit <= limit else below


def png_text(data: bytes, key: str) -> str | None:
    """Return the last text of `key` in a PNG, by its chunks."""
    found, at = None, 8
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body, at = data[at + 8 : at + 8 + length], at + 12 + length
        name, _, rest = body.partition(b"\0")
        if kind == b"IEND":
            break
        if name != key.encode() or kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        if kind == b"tEXt":
            found = rest.decode("latin-1")
        elif kind == b"zTXt":
            found = zlib.decompress(rest[1:]).decode("latin-1")
        else:
            text = rest[2:].split(b"\0", 2)[2]
            found = (zlib.decompress(text) if rest[:1] == b"\1" else text).decode()
    return found


def contains_record(data: bytes, record: Mapping[str, Any]) -> None:
    """Raise WrongAcceptanceError unless every text of a record stands in the file.

    The blocks of a GIF's comment have a byte of length every 255 bytes; JSON may escape texts.
    """
    bare = re.sub(rb"\xff(?=.{255})", b"", data, flags=re.DOTALL) + data
    for text in _texts(record):
        forms = {text.encode(code, "replace") for code in ("utf-8", "latin-1")}
        forms.add(json.dumps(text)[1:-1].encode())
        if len(text) < 100 and not any(form in bare for form in forms):
            raise WrongAcceptanceError(f"{text!r} does not stand in the file")


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height of a picture as it is shown, by Pillow."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        shown = ImageOps.exif_transpose(image)
        return shown.size


@cache
def t5_tokenizer(spiece: bytes) -> Any:
    """Return the `tokenizers` library's T5, from the bytes of a spiece.model."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    model = SentencePieceProcessor(model_proto=spiece)
    size = model.vocab_size()
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(size)]
    extra = [f"<extra_id_{99 - number}>" for number in range(100)]
    vocabulary = pieces + [(name, 0.0) for name in extra]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    (spec,) = _proto_fields(spiece, 3)
    tables = [value for value in _proto_fields(spec, 2) if value]
    steps: list[Any] = [normalizers.Precompiled(table) for table in tables]
    steps += [normalizers.Strip(left=False), normalizers.Replace(_spaces(), "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    specials = [AddedToken(name, special=True) for name in ("<pad>", "</s>", "<unk>", *extra)]
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _spaces() -> Any:
    from tokenizers import Regex

    return Regex(" {2,}")


def _proto_fields(data: bytes, number: int) -> Iterable[bytes]:
    """Yield the values of a field of bytes in a protocol buffer."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 2:
            length, at = _varint(data, at)
            if tag >> 3 == number:
                yield data[at : at + length]
            at += length
        elif tag & 7 == 0:
            _, at = _varint(data, at)
        else:
            at += {1: 8, 5: 4}[tag & 7]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
