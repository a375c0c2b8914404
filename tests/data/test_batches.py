"""Tests of sampling training and validation windows."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.batches import Batches, gather, permute, validation_windows
from fastgpt.data.token_files import IdFile
from fastgpt.utils.errors import UsageError
from fastgpt.utils.hashing import mix


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permute_is_one_to_one(size: int, seed: int) -> None:
    image = permute(np.arange(size, dtype=np.uint64), size, mix(seed, 0))
    assert sorted(image.tolist()) == list(range(size))


def test_permute_with_a_key_for_each_index() -> None:
    index = np.arange(999, dtype=np.uint64)
    keys = mix(7, index % np.uint64(3))
    mixed = permute(index, 999, keys)
    for key in np.unique(keys):
        assert (mixed[keys == key] == permute(index, 999, key)[keys == key]).all()


def test_permute_depends_on_its_key_and_scatters() -> None:
    index = np.arange(10_000, dtype=np.uint64)
    first, second = (permute(index, 10_000, mix(0, key)) for key in (1, 2))
    assert (first == second).mean() < 0.01
    assert (first == index).mean() < 0.01
    assert abs(np.corrcoef(first.astype(float), index.astype(float))[0, 1]) < 0.05


def test_mix_is_splitmix64() -> None:
    """Compare with the published first outputs of SplitMix64 (Steele, Lea & Flood) for seed 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(mix(0, i)) for i in range(3)] == expected


def starts_of(batches: Batches, first: int, count: int) -> list[int]:
    """Return the start positions of samples, for tokens whose value is their position."""
    inputs, targets = batches.samples(first, count)
    assert inputs.shape == targets.shape == (count, batches.block_size)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert (targets == inputs + 1).all()
    assert ((inputs - inputs[:, :1]) == torch.arange(batches.block_size)).all()
    starts = inputs[:, 0].tolist()
    assert starts == batches.starts(first, count).tolist()
    return starts


@pytest.mark.parametrize(("n_tokens", "block"), [(100, 7), (64, 8), (1000, 16), (32, 16), (9, 1)])
def test_every_window_exactly_once_an_epoch(n_tokens: int, block: int) -> None:
    batches = Batches(np.arange(n_tokens, dtype=np.uint16), block, seed=3)
    size = batches.n_windows
    epochs = [starts_of(batches, epoch * size, size) for epoch in range(40)]
    offsets = set()
    for epoch in epochs:
        in_order = sorted(epoch)
        offsets.add(in_order[0])
        assert in_order == list(range(in_order[0], in_order[0] + size * block, block))
        assert in_order[-1] + block < n_tokens
    assert len(offsets) > 1 or block == 1  # each epoch has its own offset
    assert size == 1 or len({tuple(np.argsort(epoch)) for epoch in epochs}) > 1


def test_the_order_of_a_seed_stays_what_it_is() -> None:
    """Pin the order: if it changed, a resumed run would see other samples."""
    batches = Batches(np.arange(1000, dtype=np.uint16), 16, seed=3)
    assert starts_of(batches, 0, 8) == [499, 963, 51, 547, 595, 307, 435, 819]
    assert starts_of(batches, 56, 8) == [243, 419, 611, 195, 803, 631, 199, 135]
    assert starts_of(batches, 8 * 10**6, 8) == [326, 630, 566, 934, 182, 614, 246, 822]
    assert starts_of(Batches(batches.tokens, 16, seed=4), 0, 8) != starts_of(batches, 0, 8)


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(20, 3000),
    block=st.integers(1, 10),
    per_step=st.integers(1, 50),
    first_step=st.integers(0, 10**12),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
def test_any_number_of_processes_and_any_micro_batches(
    n_tokens: int, block: int, per_step: int, first_step: int, cuts: list[int]
) -> None:
    """Check that all processes together use the samples that one process uses, in that order."""
    tokens = np.arange(n_tokens, dtype=np.uint16)
    steps = range(first_step, first_step + 3)
    alone = Batches(tokens, block, seed=1).starts(first_step * per_step, 3 * per_step).tolist()
    for n_ranks in (1, 2, 3, 4):
        ranks = [Batches(tokens, block, seed=1) for _ in range(n_ranks)]
        together: list[int] = []
        for step in steps:
            for rank, batches in enumerate(ranks):
                first, last = (step * per_step + r * per_step // n_ranks for r in (rank, rank + 1))
                sizes = itertools.cycle(cuts)
                while first < last:
                    count = min(next(sizes), last - first)
                    together += starts_of(batches, first, count)
                    first += count
        assert together == alone


def test_samples_across_a_chunk_of_starts() -> None:
    batches = Batches(np.arange(60_000, dtype=np.uint16), 3, seed=1)
    whole = starts_of(batches, 0, 3 * 4096)
    assert starts_of(batches, 4090, 12) == whole[4090:4102]
    assert starts_of(batches, 4095, 4098) == whole[4095:8193]
    assert starts_of(batches, 4096, 1) == whole[4096:4097]
    for first, count in ((-1, 1), (0, 0), (5, -1)):
        with pytest.raises(ValueError, match="first must be >= 0 and count >= 1"):
            batches.samples(first, count)


class ManyTokens:
    """A stand-in with more tokens than fit in memory, which has only a length."""

    def __len__(self) -> int:
        return 2**52


def test_starts_beyond_32_bits() -> None:
    batches = Batches(ManyTokens(), 1024, seed=5)  # type: ignore[arg-type]
    assert batches.n_windows == 2**42 - 1
    for first in (0, 2**42 - 3000, 2**50):
        starts = batches.starts(first, 5000)
        assert len(set(starts.tolist())) == 5000
        assert 0 <= starts.min() < 2**50
        assert 2**51 < starts.max() < 2**52 - 1024
        offsets = set((starts % 1024).tolist())
        assert len(offsets) == (2 if first == 2**42 - 3000 else 1)  # an epoch ends in the middle


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes in them")
def test_windows_beyond_32_bits(tmp_path: Path) -> None:
    path, n_tokens = tmp_path / "train.bin", 2**32 + 5000
    with path.open("wb") as file:
        file.truncate(2 * n_tokens)
        file.seek(2 * (2**32 - 3))
        file.write(np.arange(1, 9, dtype="<u2").tobytes())
    tokens = IdFile(path, 0, n_tokens, 2, 100).ids()
    inputs, targets = gather(tokens, np.array([2**32 - 4, 0, n_tokens - 8]), 7)
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0] * 7, [0] * 7]
    assert targets.tolist() == [[1, 2, 3, 4, 5, 6, 7], [0] * 7, [0] * 7]
    with pytest.raises(IndexError, match="positions must be from 0 to"):
        gather(tokens, np.array([n_tokens - 7]), 7)


@settings(max_examples=80, deadline=None)
@given(
    n_tokens=st.integers(2, 400),
    block=st.integers(1, 30),
    most=st.integers(1, 500),
    n_ranks=st.integers(1, 7),
)
def test_validation_windows(n_tokens: int, block: int, most: int, n_ranks: int) -> None:
    tokens = np.zeros(n_tokens, np.uint16)
    if n_tokens <= block:
        with pytest.raises(UsageError, match=f"validation part has {n_tokens} tokens, not more"):
            validation_windows(tokens, block, most)
        return
    whole = validation_windows(tokens, block, most)
    parts = [validation_windows(tokens, block, most, rank, n_ranks) for rank in range(n_ranks)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    there = [*range(0, n_tokens - block, block)]
    assert len(whole) == min(len(there), max(1, most // block))
    assert set(whole) <= set(there)
    assert sorted(set(whole)) == whole.tolist()
    gaps = np.diff(whole) // block
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1  # evenly spread
    gather(tokens, whole, block)


@pytest.mark.parametrize("size", [0, 1, 31])
def test_less_data_than_a_context_is_rejected(size: int) -> None:
    with pytest.raises(UsageError, match=f"has {size} tokens, but block_size=16 needs .* 32"):
        Batches(np.zeros(size, dtype=np.uint16), 16, seed=0)
