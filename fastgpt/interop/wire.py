"""Bytes taken apart: variable-length numbers, and the fields of a protocol buffer.

The encoding: https://protobuf.dev/programming-guides/encoding. It is read strictly: a field that is
not expected, or twice where one is, is an error, as nobody here knows what it would change.
"""

from collections.abc import Mapping

VARINT, BYTES, FIXED32 = 0, 2, 5  # types of a field: a number, some bytes, four bytes of a number


class Reader:
    """Takes bytes from the front of `data`; ValueError where there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether all is taken."""
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        """Take so many bytes."""
        end = self._at + size
        if end > len(self._data):
            left = len(self._data) - self._at
            raise ValueError(f"{size:,} bytes are announced where {left:,} are left")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def varint(self) -> int:
        """Take a number below 2^64, seven bits a byte and the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80 and value < 1 << 64:
                return value
        raise ValueError("a number takes more than 64 bits")


class UnsupportedError(ValueError):
    """What is well-formed, as far as it was read, but not known or not supported here."""


class Message:
    """The fields of a protocol buffer, by their numbers.

    known: which fields there may be, and each one's type. ValueError for anything else.
    """

    def __init__(self, data: bytes, known: Mapping[int, int]) -> None:
        self._numbers: dict[int, int] = {}
        self._parts: dict[int, list[bytes]] = {}
        reader = Reader(data)
        while not reader.done:
            field, wire_type = divmod(reader.varint(), 8)
            if known.get(field) != wire_type:
                raise UnsupportedError(f"field {field} of type {wire_type} is not known here")
            if wire_type == BYTES:
                self._parts.setdefault(field, []).append(reader.take(reader.varint()))
                continue
            if field in self._numbers:
                raise ValueError(f"field {field} is there twice")
            self._numbers[field] = (
                int.from_bytes(reader.take(4), "little")
                if wire_type == FIXED32
                else reader.varint()
            )

    def number(self, field: int) -> int:
        """Return a number without a sign, 0 if the field was left out."""
        return self._numbers.get(field, 0)

    def signed(self, field: int) -> int:
        """Return a number whose sign is bit 63."""
        value = self.number(field)
        return value - ((value >> 63) << 64)

    def parts(self, field: int) -> list[bytes]:
        """Return what a field of bytes, or of messages, holds each time that it is there."""
        return self._parts.get(field, [])
