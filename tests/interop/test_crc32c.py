"""CRC-32C: both implementations against the standard's examples and a bitwise computation.

The running checksum has the interface of zlib's.
"""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import _C

STREAM = 4096  # bytes per stream of the three streams in csrc/common/crc32c.cpp

# RFC 3720, B.4; the last is the check value of the catalogue of parametrised CRC algorithms.
KNOWN = {
    "zeros": (bytes(32), 0x8A9136AA),
    "ones": (b"\xff" * 32, 0x62A8AB43),
    "ascending": (bytes(range(32)), 0x46DD794E),
    "descending": (bytes(range(31, -1, -1)), 0x113FDB5C),
    "read-command": (
        bytes.fromhex(
            "01c00000000000000000000000000000"
            "14000000000004000000001400000018"
            "28000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
    "digits": (b"123456789", 0xE3069283),
}

ways = pytest.mark.parametrize("hardware", [True, False], ids=["best", "portable"])


@ways
@pytest.mark.parametrize("name", KNOWN)
def test_gives_the_values_of_the_standard(name: str, hardware: bool) -> None:
    data, crc = KNOWN[name]
    assert _C.crc32c(data, 0, hardware) == crc


@ways
@given(st.binary(max_size=80), st.integers(0, 2**32 - 1))
def test_equals_a_division_bit_by_bit(hardware: bool, data: bytes, initial: int) -> None:
    assert _C.crc32c(data, initial, hardware) == _bit_by_bit(data, initial)


@pytest.mark.parametrize("streams", [0, 3, 6])
@pytest.mark.parametrize("more", [-9, -1, 0, 1, 7, 8, 9, STREAM])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_both_ways_agree_wherever_the_data_starts_and_ends(
    streams: int, more: int, start: int
) -> None:
    size = max(0, streams * STREAM + more)
    data = np.random.RandomState(size).bytes(start + size)
    view = memoryview(data)[start:]
    assert _C.crc32c(view, 12345) == _C.crc32c(view, 12345, hardware=False)


@ways
@given(st.integers(0, 40_000), st.integers(0, 40_000))
def test_goes_on_from_where_it_stopped(hardware: bool, size: int, cut: int) -> None:
    data = np.random.RandomState(1).bytes(size)
    first = _C.crc32c(data[:cut], 0, hardware)
    assert _C.crc32c(data[cut:], first, hardware) == _C.crc32c(data, 0, hardware)


@ways
def test_each_bit_of_a_long_text_counts(hardware: bool) -> None:
    data = bytearray(np.random.RandomState(2).bytes(7 * STREAM + 5))
    whole = _C.crc32c(data, 0, hardware)
    for at in range(0, len(data), 997):
        data[at] ^= 1 << at % 8
        assert _C.crc32c(data, 0, hardware) != whole
        data[at] ^= 1 << at % 8


def test_takes_any_contiguous_buffer() -> None:
    numbers = np.arange(100, dtype=np.float32).reshape(10, 10)
    for same in (numbers, memoryview(numbers), bytearray(numbers), numbers.tobytes()):
        assert _C.crc32c(same) == _bit_by_bit(numbers.tobytes(), 0)
    assert _C.crc32c(b"", initial=7) == 7


@pytest.mark.parametrize("wrong", ["text", None, 5, np.zeros((4, 4))[:, 1]], ids=repr)
def test_refuses_what_has_no_bytes_in_one_piece(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        _C.crc32c(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_refuses_an_initial_value_of_more_than_32_bits(wrong: int) -> None:
    with pytest.raises(TypeError):
        _C.crc32c(b"", wrong)


def test_leaves_the_lock_of_python_to_others() -> None:
    data = np.zeros(64 << 20, np.uint8)
    done = threading.Event()

    def sums() -> None:
        for _ in range(20):
            _C.crc32c(data, hardware=False)
        done.set()

    thread = threading.Thread(target=sums)
    thread.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 20  # if the GIL were held, at most one turn per call


def _bit_by_bit(data: bytes, initial: int) -> int:
    crc = initial ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
