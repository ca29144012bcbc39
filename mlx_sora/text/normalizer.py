"""Character normalization of T5's tokenizer: a table in `spiece.model`, read as `tokenizers` does.

sentencepiece replaces the longest known prefix of the text that is left. `tokenizers` looks at
grapheme clusters: one of less than six bytes is replaced whole by the value of its shortest known
prefix ("e" and two marks lose the second one); a longer one is replaced character by character, so
that nothing in it is composed.
Source: the table's format is that of Darts-clone double arrays and sentencepiece's normalizer.
"""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

#: Clusters of at least this many bytes of UTF-8 are replaced character by character.
_LONG = 6

#: Bytes of a replacement. The longest one of Unicode has 33.
MAX_VALUE = 256

#: Characters that extend a grapheme cluster but are no marks (UAX #29), and marks that do not.
_EXTENDING = frozenset(
    "\u0e33\u0eb3\u200c\u200d\uff9e\uff9f"
    + "".join(map(chr, [*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)]))
)
_SEPARATE_MARKS = frozenset(
    "\u102b\u102c\u1038\u1062\u1063\u1064\u1067\u1068\u1069\u106a\u106b\u106c\u106d\u1083\u1087"
    "\u1088\u1089\u108a\u108b\u108c\u108f\u109a\u109b\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d"
    "\U00011720\U00011721"
)

#: Characters that begin a cluster with the one after them (UAX #29, Prepend).
_PREPENDED = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e"
    "\U000110bd\U000110cd\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011a84\U00011a85"
    "\U00011a86\U00011a87\U00011a88\U00011a89\U00011d46\U00011f02"
)


class Normalizer:
    """The replacements in the model `proto`, the content of a `spiece.model`.

    Raises ValueError if its table is damaged.
    """

    def __init__(self, proto: bytes) -> None:
        table = _charsmap(proto)
        #: Checksum of the table.
        self.digest = hashlib.sha256(table).hexdigest()
        size = struct.unpack_from("<I", table)[0] if len(table) > 4 else 0
        if size % 4 or size > max(0, len(table) - 4):
            raise ValueError("the normalization table is damaged")
        #: Trie of replaced texts as a double array, and their replacements, NUL after each.
        self._units = struct.unpack_from(f"<{size // 4}I", table, 4 if size else 0)
        self._values = table[4 + size :]
        self._ascii = {code: self._replace(chr(code)) for code in range(128)}

    def normalize(self, text: str) -> str:
        """Return `text` with every cluster replaced. White space is neither joined nor stripped."""
        if text.isascii():  # each character is a cluster, but for one pair
            line_end = self._replace("\r\n")
            return line_end.join(part.translate(self._ascii) for part in text.split("\r\n"))
        return "".join(map(self._replace, grapheme_clusters(text)))

    def _replace(self, cluster: str) -> str:
        found = self._find(cluster) if len(cluster.encode()) < _LONG else None
        if found is not None:
            return found
        values = ((char, self._find(char)) for char in cluster)
        return "".join(char if value is None else value for char, value in values)

    def _find(self, text: str) -> str | None:
        """Return the value of the shortest prefix of `text` in the table."""
        units = self._units
        node = _offset(units[0]) if units else len(units)
        for byte in text.encode():
            node ^= byte
            unit = units[node] if byte and node < len(units) else 0
            if not byte or unit & (1 << 31 | 0xFF) != byte:
                return None
            node ^= _offset(unit)
            if unit & 1 << 8 and node < len(units):  # its child is a value
                begin = units[node] & ((1 << 31) - 1)
                value = self._values[begin : begin + MAX_VALUE].split(b"\0")[0]
                return value.decode(errors="replace")
        return None


def grapheme_clusters(text: str) -> Iterator[str]:
    """Yield the grapheme clusters of `text`: what a reader takes for one character.

    UAX #29 without its rules for Hangul syllables, flags and joined emoji: these have six bytes and
    more, and no part of them composes.
    """
    start = 0
    for index, (before, after) in enumerate(pairwise(text), start=1):
        if not _is_joined(before, after):
            yield text[start:index]
            start = index
    if text:
        yield text[start:]


def _is_joined(before: str, after: str) -> bool:
    if before == "\r" and after == "\n":
        return True
    if _is_control(before) or _is_control(after):
        return False
    return _extends(after) or before in _PREPENDED


def _is_control(char: str) -> bool:
    if char in _EXTENDING or char in _PREPENDED:
        return False
    return unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")


def _extends(char: str) -> bool:
    if char in _EXTENDING:
        return True
    return unicodedata.category(char)[0] == "M" and char not in _SEPARATE_MARKS


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def _charsmap(proto: bytes) -> bytes:
    """Return field 2 (precompiled_charsmap) of field 3 (normalizer_spec); empty if absent."""
    found = dict(_fields(proto))
    return dict(_fields(found.get(3, b""))).get(2, b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields with a length in a protocol buffer message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            _, place = _varint(message, place)
        elif kind == 2:
            size, place = _varint(message, place)
            yield tag >> 3, message[place : place + size]
            place += size
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError("a field of unknown type")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number at `place` and the place after it."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError("a number without an end")
