"""Decoding of variable-length integers and protocol buffers.

The encoding: https://protobuf.dev/programming-guides/encoding. Decoding is strict: an unexpected or
repeated field is an error, because its meaning is unknown.
"""

from collections.abc import Mapping

VARINT, BYTES, FIXED32 = 0, 2, 5  # wire types: variable-length integer, bytes, 4-byte integer


class Reader:
    """Reads `data` sequentially; raises ValueError if too few bytes remain."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether all bytes have been read."""
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        """Read `size` bytes."""
        end = self._at + size
        if end > len(self._data):
            left = len(self._data) - self._at
            raise ValueError(f"expected {size:,} more bytes, but only {left:,} are left")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def varint(self) -> int:
        """Read an integer below 2^64: seven bits per byte, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80 and value < 1 << 64:
                return value
        raise ValueError("a number takes more than 64 bits")


class UnsupportedError(ValueError):
    """Raised for data that is well-formed as far as read, but unknown or not supported."""


class Message:
    """The fields of a protocol buffer, by field number.

    known: the wire type of each allowed field.

    Raises: UnsupportedError for other fields or types, ValueError for malformed data.
    """

    def __init__(self, data: bytes, known: Mapping[int, int]) -> None:
        self._numbers: dict[int, int] = {}
        self._parts: dict[int, list[bytes]] = {}
        reader = Reader(data)
        while not reader.done:
            field, wire_type = divmod(reader.varint(), 8)
            if known.get(field) != wire_type:
                raise UnsupportedError(f"unknown field {field} of type {wire_type}")
            if wire_type == BYTES:
                self._parts.setdefault(field, []).append(reader.take(reader.varint()))
                continue
            if field in self._numbers:
                raise ValueError(f"field {field} occurs twice")
            self._numbers[field] = (
                int.from_bytes(reader.take(4), "little")
                if wire_type == FIXED32
                else reader.varint()
            )

    def number(self, field: int) -> int:
        """Return an unsigned integer field, 0 if it is missing."""
        return self._numbers.get(field, 0)

    def signed(self, field: int) -> int:
        """Return a field as a signed 64-bit integer in two's complement."""
        value = self.number(field)
        return value - ((value >> 63) << 64)

    def parts(self, field: int) -> list[bytes]:
        """Return all values of a repeated field of bytes or messages."""
        return self._parts.get(field, [])
