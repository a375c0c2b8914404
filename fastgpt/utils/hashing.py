"""A stateless pseudo-random function of a key and an index."""

import numpy as np
import numpy.typing as npt


def mix(key: npt.ArrayLike, value: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Hash 64-bit `value` with 64-bit `key`, with the finalizer of SplitMix64 (Steele et al. 2014).

    Both are converted to uint64 arrays and broadcast.
    """
    z: npt.NDArray[np.uint64] = np.asarray(value, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        z = (z + np.asarray(key, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
