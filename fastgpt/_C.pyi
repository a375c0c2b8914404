from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

source_hash: str
"""SHA-256 over csrc/, as CMakeLists.txt computes it."""

class BytePairEncoder:
    """Byte-pair encoding over an immutable vocabulary."""

    def __init__(self, tokens: Sequence[bytes], merges: NDArray[np.uint32]) -> None:
        """Take the bytes of each id, and the merges as rows (left, right, merged), in order."""

    @staticmethod
    def from_merges_file(
        file: bytes, special_tokens: Sequence[bytes], trusted: bool = ...
    ) -> BytePairEncoder:
        """Take the bytes of a ``vocab.bpe``; special tokens get the ids after its own.

        trusted: skip the search for tokens that their own bytes are not encoded to; there are none.
        """

    def encode(
        self, text: str | bytes, specials: Sequence[tuple[int, int, int]] = ..., threads: int = ...
    ) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Encode the text, with each of its spans (begin, end, id) replaced by that id.

        Returns: uint16 if the vocabulary has at most 65,536 tokens, else uint32. Raises
        UnicodeEncodeError for a str with lone surrogates.
        """

    def to_list(self, ids: NDArray[np.uint16] | NDArray[np.uint32]) -> list[int]:
        """Return ids of ``encode`` as a list, quicker than ``tolist`` does."""

    def decode(self, ids: Any) -> bytes | None:
        """Return the bytes of a list or an array of ids, or None if it is not one of valid ids."""

    def tokens(self) -> list[bytes]: ...
    def merges(self) -> NDArray[np.uint32]: ...
    def __len__(self) -> int: ...

class BpeTrainer:
    """Learns the merges of a byte-pair encoding: first all the text, then the merges."""

    def __init__(self, threads: int = 1) -> None:
        """Count on so many threads; their number changes no merge."""

    def feed(self, block: bytes) -> None:
        """Take the next block of a text, of any size: what it ends in may go on in the next."""

    def end_text(self) -> None:
        """End a text: the next block starts another, and no piece spans both."""

    @property
    def n_pieces(self) -> int:
        """How many pieces were counted, but for those that the next block may go on with.

        0 once merging has begun.
        """

    def train(self, n_merges: int, min_count: int) -> int:
        """Make that many merges, or all there are of pairs this frequent; return how many.

        The first call's ``min_count`` holds for all.
        """

    def merges(self) -> NDArray[np.uint32]:
        """Return rows (left, right, merged); ids 0 to 255 are the bytes in GPT-2's order."""

def parse_merges_file(file: bytes) -> tuple[list[bytes], NDArray[np.uint32]]:
    """Return the tokens and the merges, rows (left, right, merged), of a ``vocab.bpe``."""

def valid_utf8(text: bytes) -> int:
    """Return how many bytes from the start are whole, valid characters."""

def unix_newlines(text: bytes) -> bytes:
    """Return the text with each Windows line end as a newline."""

def piece_ends(text: str | bytes, vectorized: bool = ...) -> list[int]:
    """Return the byte offsets where the pieces end that GPT-2's pattern cuts the text into."""

def crc32c(data: Buffer, initial: int = ..., hardware: bool = ...) -> int:
    """Return the CRC-32C (RFC 3720, section 12.1) of the bytes of a contiguous buffer.

    initial: that of the bytes before them. hardware: use the processor's instruction for it, where
    it has one. Leaves Python's lock to others.
    """

def gelu_forward(x: NDArray[np.float32], y: NDArray[np.float32], threads: int) -> None:
    """Write gelu(x) into `y`; both C-contiguous and of one size."""

def gelu_backward(
    grad: NDArray[np.float32], x: NDArray[np.float32], grad_x: NDArray[np.float32], threads: int
) -> None:
    """Write the gradient of `x` into `grad_x`, given that of gelu(x); all as in gelu_forward."""

def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threads: int,
) -> None:
    """Write ``x + residual`` into `total`, its LayerNorm into `y`, and each row's mean and 1/σ.

    Tensors, here and below: fp32, contiguous, on the CPU; ValueError if not. `y` may be bf16.
    """

def norm_apply(
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor,
    threads: int,
) -> None:
    """Write the LayerNorm of `total` into `y` again."""

def norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    threads: int,
) -> None:
    """Write the gradients, given those of the LayerNorm and of `total` itself."""

def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignored: int,
    gradient: bool,
    scale: float,
    losses: Tensor,
    threads: int,
) -> None:
    """Write the losses of logits [rows, classes] against int64 targets; 0 for ignored ones.

    gradient: the logits become that of the losses' sum, times `scale`. Raises IndexError for a
    target that is no class.
    """

def attention_is_fast() -> bool:
    """Whether this processor's vector instructions make `attention_forward` worth while."""

def attention_forward(
    qkv: Tensor, heads: int, time: int, y: Tensor, log_sums: Tensor, threads: int
) -> None:
    """Write causal attention over qkv [B, T, 3C] into `y` [B, T, C], both fp32 or both bf16.

    log_sums [B, H, T] gets the logarithms of the softmaxes' denominators.
    """

def attention_backward(
    qkv: Tensor,
    heads: int,
    time: int,
    y: Tensor,
    log_sums: Tensor,
    grad_y: Tensor,
    grad_qkv: Tensor,
    threads: int,
) -> None:
    """Write the gradient of `qkv`, given that of `y`."""

def add_rows(ids: Tensor, values: Tensor, table: Tensor, threads: int) -> None:
    """Add values [n, columns] to the rows of `table` that int64 `ids` [n] name, in their order.

    Raises IndexError for an id that is no row.
    """

def adamw(
    rows: Sequence[tuple[int, ...]],
    rates: Sequence[tuple[float, ...]],
    max_norm: float,
    threads: int,
) -> float:
    """Clip, do a step of AdamW, and return the gradients' norm; if not finite, change nothing.

    rows: of each parameter its size, then the addresses of itself, gradient, exp_avg, exp_avg_sq
    and step, all contiguous fp32 and not checked. rates: lr, beta1, beta2, eps, weight decay.
    """

def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    transpose_a: bool = ...,
    transpose_b: bool = ...,
    accumulate: bool = ...,
    bias: Tensor | None = ...,
    gelu: bool = ...,
    pre: Tensor | None = ...,
    gelu_grad: Tensor | None = ...,
    gelu_b: bool = ...,
    row_sums: Tensor | None = ...,
    threads: int = ...,
    bf16: bool = ...,
    code: str | None = ...,
) -> None:
    """Write the product op(a) · op(b) into `c`: [M, K] · [K, N] = [M, N], each transposed or not.

    All are fp32 on the CPU, with the elements of a row side by side and any distance between rows;
    with `bf16` the matrices may be bf16, too. `c` and `pre` must not overlap anything else. The
    threads are PyTorch's own, and their number changes no bit. Autograd sees nothing of it.

    Args:
        transpose_a: `a` is stored as [K, M].
        transpose_b: `b` is stored as [N, K], as the weight of a linear layer is.
        accumulate: add to `c`, fp32, and to `row_sums`; not together with GELU.
        bias: [N], added to every row.
        gelu: write gelu(product + bias), in the tanh form.
        pre: [M, N], with `gelu`: also gets product + bias.
        gelu_grad: [M, N]: the product is multiplied by gelu's derivative there.
        gelu_b: take gelu(b) for b.
        row_sums: [M], gets the sums of op(a)'s rows: a bias's gradient beside its weight's.
        bf16: round the operands to bf16; sums stay fp32.
        code: "portable", "avx2", "avx512", or for products in bf16 "bf16-portable" or
            "bf16-avx512"; by default the best for this processor.

    Raises ValueError for anything else.
    """

def gemm_is_faster(bf16: bool) -> bool:
    """Whether to prefer `gemm` to PyTorch's product, in fp32 or in bf16.

    In fp32 on AMD's processors with AVX2; in bf16 where there is AVX512-BF16 and no AMX.
    """

def pool_array(
    shape: Sequence[int], bf16: bool = ...
) -> NDArray[np.float32] | NDArray[np.uint16] | None:
    """Return an array from the pool for a step's memory, not initialised; None if there is none.

    bf16: of that, as its bits.
    """

def pool_usage() -> tuple[int, int]:
    """Return how many bytes the pool has reached up to since `trim_pool`, and how many are used."""

def trim_pool() -> None:
    """Give the system back what of the pool nobody uses."""

class Generation:
    """Prompts, and what an engine writes behind them."""

    def read(self, vocab_size: int) -> NDArray[np.float32]:
        """Read what is not yet read; return the logits [rows, vocab_size] of what follows."""

    def step(self) -> list[int] | None:
        """Return the next token of each row, or None when all is written."""

    def end(self, row: int) -> None:
        """End a row: nothing more is computed for it."""

    def logprobs(self) -> list[float]:
        """Return how likely the network found the last token of each row, in nats."""

    def run(self, on_tokens: Callable[[list[int]], bool | None] | None) -> list[list[int]]:
        """Take all steps, looking for Ctrl-C after each; `on_tokens` stops them by returning true.

        Returns what they returned. Python's lock is free while a step is computed.
        """

class Engine:
    """GPT-2 on a CPU, without PyTorch: see fastgpt/inference/engine.py."""

    def __init__(
        self,
        config: dict[str, Any],
        dtype: str,
        group: int,
        threads: int,
        code: str,
        weights: Mapping[str, Tensor | tuple[Tensor, Tensor]],
    ) -> None:
        """Copy the weights: fp32, or pairs of integers and scales as `quantize` makes them.

        dtype: "float32", "bfloat16", "int8" or "int4". group: 32 or 64 weights that share a scale
        in "int4". code: "best" or one of `engine_codes`. Missing biases are zeros. Raises
        ValueError, naming the weight, for one that is missing, unknown, of another shape or dtype,
        or not finite.
        """

    def generation(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new_tokens: int,
        settings: dict[str, float],
        seeds: Sequence[int],
        stop: int | None,
        with_logprobs: bool,
    ) -> Generation:
        """Begin to write behind prompts, which may differ in length: `copies` rows behind each.

        seeds: one for each row.
        settings: temperature, top_k (0: all), top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty.
        """

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [tokens, vocab_size] behind each token."""

    def matrix(
        self, name: str
    ) -> NDArray[np.float32] | tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return a matrix as it is in here: floats, or integers and scales (two dimensions)."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """Return a bias (with zeros up to a multiple of 32), a norm's weights, or positions."""

    def multiply(self, name: str, x: Tensor, rows: int) -> NDArray[np.float32]:
        """Return the product of x [rows, K] and a matrix, plus its bias: one kernel, for tests."""

    @property
    def threads(self) -> int: ...
    @property
    def bytes_per_token(self) -> int: ...

def quantize(
    weights: Tensor, outputs: int, dtype: str, group: int, threads: int, name: str = "weights"
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round weights [outputs, K] to "int8" or "int4": integers (as bytes) and scales, in rows.

    name: how an error calls them; ValueError if they are not finite.
    """

MOST_THREADS: int  # of an engine

def engine_codes() -> list[str]:
    """Return the names of the instructions that engines can use on this processor."""
