"""Mutations that keep an input readable, so that fuzzing gets past parsers into our checks."""

from __future__ import annotations

import json
import random
from typing import Any

#: Values that have broken readers before: wrong types, limits, and texts that want out.
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        17,
        255,
        2**31,
        2**53,
        2**63,
        2**64,
        -(2**63),
        10**30,
        10**400,
    ),
    *(0.0, 0.5, -1.5, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "..", "../../x", "/etc/passwd", "~", "~nobody/x", "a" * 300, "\x1b[31mred", "\0"),
    *("\ud800", "\u202e", "9" * 5000, "1e999", "NaN", "%s{0}", "{seed:99}", "$(id)", "a\nb", "é"),
    *([], {}, [[]], [None], {"a": 1}, [0, 0], [4, 16], "F32", "U32"),
)


def mutate_json(data: bytes, limit: int, seed: int) -> bytes:
    """`data`, which should be JSON, with a node changed, added, moved or doubled."""
    chance = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, limit, seed)
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = _mutated(value, chance)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.7)
    if chance.random() < 0.05:  # the same key twice
        text = text.replace("{", '{"a": 1, "a": 2, ', 1) if '": ' in text else text
    if chance.random() < 0.05:
        text = "[" * 3000 + text
    return text.encode("utf-8", "surrogatepass")[:limit]


def _mutated(value: Any, chance: random.Random) -> Any:
    """`value` with one node of it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        out = dict(value)
        roll = chance.random()
        if roll < 0.08:
            out.pop(key)
        elif roll < 0.16:
            out[_text(chance)] = out.pop(key)
        elif roll < 0.2:
            out[chance.choice(list(value))] = out[key]
        else:
            out[key] = _mutated(out[key], chance)
        return out
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        roll = chance.random()
        if roll < 0.15:
            return value[:index] + value[index + 1 :]
        if roll < 0.3:
            return value + [value[index]] * chance.choice((1, 2, 50))
        return [*value[:index], _mutated(value[index], chance), *value[index + 1 :]]
    if isinstance(value, (int, float)) and abs(value) < 2**64 and chance.random() < 0.4:
        return value + chance.choice((1, -1, 4, -4, 1000, 0.5))
    if isinstance(value, str) and chance.random() < 0.4:
        return _spliced(value, chance)
    return chance.choice(ODD)


def _text(chance: random.Random) -> str:
    return chance.choice([each for each in ODD if isinstance(each, str)])


def _spliced(text: str, chance: random.Random) -> str:
    at = chance.randint(0, len(text))
    return text[:at] + _text(chance)[:40] + text[at + chance.choice((0, 0, 1, 3)) :]


def mutate_bytes(data: bytes, limit: int, seed: int) -> bytes:
    """`data` with bytes flipped, numbers of 1 to 8 bytes set to limits, or pieces moved."""
    chance, out = random.Random(seed), bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(out)) if out else 0
        roll = chance.random()
        if roll < 0.3 and out:
            out[at] ^= 1 << chance.randrange(8)
        elif roll < 0.6:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice(
                (0, 1, 0x7F, 0xFF, 10**9, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
            )
            order = chance.choice(("big", "little"))
            out[at : at + width] = (number & (256**width - 1)).to_bytes(width, order)
        elif roll < 0.75:
            del out[at : at + chance.choice((1, 2, 8, 64))]
        elif roll < 0.9:
            piece = out[at : at + chance.choice((1, 4, 32, 256))]
            to = chance.randint(0, len(out))
            out[to:to] = piece
        else:
            out += bytes(chance.randrange(256) for _ in range(chance.choice((1, 8, 64))))
    return bytes(out[:limit])


#: Pieces of the small languages that are read from words and prompts.
PIECES = (
    *("|0|", "|2|", "{", "}", '{"reference_path": "a.png"}', '"', "'", "\\n", "\\", ";", ",", ":"),
    *("=", "0", "1", "-1", "17", "9" * 30, "9" * 400, "1e400", "nan", "inf", "0.5", "every:4"),
    *("table:8,file=", "online", "adaptive:patience=", "fixed:", "t:660", "order=1", "2s", "GB"),
    *("KiB", "16:9", "720p", "%04d", "%999999999d", "{seed}", "{index:03d}", "{seed:999999999}"),
    *("{prompt_slug}", "../", "/", "~", "~x/", ".png", ".mp4", "http://a.com/", "www.", "a.", "a-"),
    *("<a ", "<!--", "<b>", "</b>", "<person>", "&amp;", "&#x41;", "%3C", "%00", "@a", "#123", "x"),
    *("\x1b[2J", "\x07", "\0", "\n", "\r", "\u202e", "\u2028", "\u00a0", "中", "é", "🎬", "</s>"),
    *("<extra_id_7>", "vae=", "a/b", "@main", ":sub", " ", "  ", "."),
)


def mutate_text(data: bytes, limit: int, seed: int) -> bytes:
    """`data` as a text with pieces put in, doubled or taken out."""
    chance, text = random.Random(seed), data.decode("utf-8", "replace")
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, roll = chance.randint(0, len(text)), chance.random()
        if roll < 0.5:
            text = text[:at] + chance.choice(PIECES) + text[at:]
        elif roll < 0.7:
            text = text[:at] + text[at : at + 8] * chance.choice((2, 20)) + text[at + 8 :]
        elif roll < 0.85:
            text = text[:at] + text[at + chance.choice((1, 2, 8)) :]
        else:
            text = (
                text[:at]
                + chr(chance.choice((chance.randrange(128), chance.randrange(0xD800))))
                + text[at:]
            )
    return text.encode("utf-8", "replace")[:limit]
