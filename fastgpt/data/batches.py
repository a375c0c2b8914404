"""Sample training and validation windows from the tokens of a corpus.

The order of the training windows depends on the seed and the sample index alone. Each epoch cuts
the tokens into windows, starting at a new offset, and visits every window exactly once in a
pseudo-random order. No sampler state has to be saved to resume at any sample.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.data.token_files import Tokens, cut_windows
from fastgpt.utils.errors import UsageError
from fastgpt.utils.hashing import mix


class Batches:
    """The shuffled training samples of a run, addressed by a sample index that starts at 0.

    Args:
        tokens: the training tokens, cut into windows of `block_size`.
        block_size: tokens per sample.
        seed: seed of the order of the samples.

    Sample i depends only on the arguments and i, not on earlier calls. Processes can therefore
    divide a run by dividing the indices, and resuming at any index is immediate.

    Raises: UsageError if the text is shorter than two windows.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int) -> None:
        self.n_windows = (len(tokens) - block_size) // block_size
        if self.n_windows < 1:
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, but block_size={block_size} needs "
                f"at least {2 * block_size:,}; use more text or lower --block-size to at most "
                f"{len(tokens) // 2}"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed

    def samples(self, first: int, count: int) -> Tensor:
        """Return samples `first` to `first + count - 1`; see :func:`gather`.

        They can be unpacked: ``inputs, targets = batches.samples(0, 8)``.
        """
        return gather(self.tokens, self.starts(first, count), self.block_size)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the positions in the tokens at which these samples start, int64 `[count]`."""
        if first < 0 or count < 1:
            raise ValueError(f"first must be >= 0 and count >= 1, not first={first}, count={count}")
        chunks = range(first // _CHUNK, (first + count - 1) // _CHUNK + 1)
        starts = [_window_starts(i, self.n_windows, self.block_size, self.seed) for i in chunks]
        at = first % _CHUNK
        return np.concatenate(starts)[at : at + count]


# Start positions are computed for this many samples at a time. For a single micro-batch, the
# overhead of the NumPy calls would cost as much as computing about a thousand start positions.
_CHUNK = 4096


@lru_cache(maxsize=4)  # consecutive calls usually need the same chunk
def _window_starts(chunk: int, n_windows: int, block_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the start positions of a chunk of samples, int64 `[_CHUNK]`.

    Sample i is number i % n_windows of epoch i // n_windows. The epoch determines a key, and the
    key determines the position of the first window (so that the windows of each epoch are cut at
    other places) and a permutation of the windows.
    """
    sample = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK, dtype=np.uint64)
    epoch, index = np.divmod(sample, np.uint64(n_windows))
    key = mix(seed, epoch)
    offset = mix(key, 0) % np.uint64(block_size)
    window = permute(index, n_windows, key)
    return (offset + window * np.uint64(block_size)).astype(np.int64)


def gather(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> Tensor:
    """Return the windows at `starts` as one int64 CPU tensor `[2, len(starts), block_size]`.

    Its rows are the inputs and the targets, which are the inputs shifted by one token; unpacking it
    (``inputs, targets = gather(...)``) gives two contiguous tensors.
    """
    windows = cut_windows(tokens, starts, block_size + 1)
    pair = np.empty((2, len(starts), block_size), np.int64)
    pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
    return torch.from_numpy(pair)


def validation_windows(
    tokens: Tokens, block_size: int, max_tokens: int, rank: int = 0, n_ranks: int = 1
) -> npt.NDArray[np.int64]:
    """Return the start positions of the windows that process `rank` of `n_ranks` evaluates.

    Together, the processes evaluate every window of the text exactly once. If the windows have more
    than `max_tokens` tokens, evenly spaced windows with at most that many tokens are used, the
    same ones in each evaluation. The shares of the processes differ by at most one window, and some
    are empty if there are fewer windows than processes.

    Raises: UsageError if the text is shorter than one window and its last target.
    """
    starts = np.arange(0, len(tokens) - block_size, block_size, dtype=np.int64)
    if len(starts) == 0:
        raise UsageError(
            f"the validation part has {len(tokens):,} tokens, not more than "
            f"block_size={block_size}; use more text, lower --block-size or raise --val-fraction"
        )
    most = max(1, max_tokens // block_size)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
    return np.array_split(starts, n_ranks)[rank]


def permute(
    index: npt.NDArray[np.uint64], size: int, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Permute the indices below `size` with a Feistel network; each key gives one permutation.

    Args:
        index: indices to map, uint64 `[n]`, each below `size`.
        size: number of elements of the permutation.
        key: one key for all indices, or one per index.

    The network has four rounds and works on the smallest even number of bits that holds
    `size - 1`. It can map an index to a value of `size` or more; such values are mapped again until
    they are below `size` (cycle walking, Black & Rogaway 2002).
    """
    # A Feistel round maps (left, right) to (right, left ^ f(right)), which is invertible for any f,
    # so the four rounds are a permutation of all 2 * half bits.
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    result = index.astype(np.uint64)
    keys = np.broadcast_to(key, result.shape)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right, here = result[outside] >> half, result[outside] & mask, keys[outside]
        for turn in range(1, 5):
            left, right = right, left ^ (mix(here + np.uint64(turn), right) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result
