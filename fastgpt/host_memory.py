"""Memory of the host that training uses again and again."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of handing it back to the system.

    Each step frees and allocates the same buffers; without this the system takes the large ones
    back and gives them again page by page, zeroed: 10 to 20% of a small model's step.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
