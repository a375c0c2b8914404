from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

source_hash: str
"""SHA-256 of the sources in csrc/, computed by CMakeLists.txt at build time."""

class BytePairEncoder:
    """A byte-pair encoder with an immutable vocabulary."""

    def __init__(self, tokens: Sequence[bytes], merges: NDArray[np.uint32]) -> None:
        """Create an encoder from the bytes of each id and the merges in order of priority.

        merges: rows of ids (left, right, merged), ``[n, 3]``.
        """

    @staticmethod
    def from_merges_file(
        file: bytes, special_tokens: Sequence[bytes], trusted: bool = ...
    ) -> BytePairEncoder:
        """Create an encoder from the contents of a ``vocab.bpe`` file.

        special_tokens: they get the ids after those of the file.
        trusted: asserts that encoding the bytes of each token gives that token, so that the search
        for tokens for which this is not the case is skipped.
        """

    def encode(
        self, text: str | bytes, specials: Sequence[tuple[int, int, int]] = ..., threads: int = ...
    ) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return the ids of a text.

        specials: spans (begin, end, id) of the text, in bytes, each of which is encoded as the id.
        threads: maximum number of threads.

        Returns: uint16 if the vocabulary has at most 65,536 tokens, otherwise uint32. Raises
        UnicodeEncodeError for a str with lone surrogates.
        """

    def to_list(self, ids: NDArray[np.uint16] | NDArray[np.uint32]) -> list[int]:
        """Return ids of ``encode`` as a list, faster than ``tolist``."""

    def decode(self, ids: Any) -> bytes | None:
        """Return the bytes of a list or array of ids.

        Returns None for other types and invalid ids.
        """

    def tokens(self) -> list[bytes]: ...
    def merges(self) -> NDArray[np.uint32]: ...
    def __len__(self) -> int: ...

class BpeTrainer:
    """Learns the merges of a byte-pair encoding. Feed all text before training."""

    def __init__(self, threads: int = 1) -> None:
        """Create a trainer that counts with this many threads; they do not affect the merges."""

    def feed(self, block: bytes) -> None:
        """Add the next block of a text; a block can end anywhere, also within a piece."""

    def end_text(self) -> None:
        """End the current text; the next block starts another one, and no piece spans both."""

    @property
    def n_pieces(self) -> int:
        """Number of pieces counted, except those that the next block may continue.

        It is 0 after merging has begun.
        """

    def train(self, n_merges: int, min_count: int) -> int:
        """Make up to ``n_merges`` merges of pairs that occur ``min_count`` times or more.

        Returns: the number of merges made. ``min_count`` of the first call is used for all calls.
        """

    def merges(self) -> NDArray[np.uint32]:
        """Return the merges as rows (left, right, merged).

        Ids 0 to 255 are the bytes in GPT-2's order.
        """

def parse_merges_file(file: bytes) -> tuple[list[bytes], NDArray[np.uint32]]:
    """Return the tokens and the merges, rows (left, right, merged), of a ``vocab.bpe`` file."""

def valid_utf8(text: bytes) -> int:
    """Return the length in bytes of the longest prefix that is valid UTF-8."""

def unix_newlines(text: bytes) -> bytes:
    """Return the text with each Windows line ending replaced by a newline."""

def piece_ends(text: str | bytes, vectorized: bool = ...) -> list[int]:
    """Return the byte offsets of the ends of the pieces into which GPT-2's pattern splits a text.

    vectorized: use the vectorized implementation.
    """

def crc32c(data: Buffer, initial: int = ..., hardware: bool = ...) -> int:
    """Return the CRC-32C (RFC 3720, section 12.1) of the bytes of a contiguous buffer.

    initial: the CRC of the preceding bytes. hardware: use the processor's CRC-32C instruction if it
    has one. Releases the GIL.
    """

def gelu_forward(x: NDArray[np.float32], y: NDArray[np.float32], threads: int) -> None:
    """Write gelu(x) to `y`; both are C-contiguous and of the same size."""

def gelu_backward(
    grad: NDArray[np.float32], x: NDArray[np.float32], grad_x: NDArray[np.float32], threads: int
) -> None:
    """Write the gradient of `x` to `grad_x`, given that of gelu(x); shapes as in gelu_forward."""

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
    """Write ``x + residual`` to `total`, its LayerNorm to `y`, and the mean and 1/σ of each row.

    All tensors, here and below, must be contiguous fp32 CPU tensors; otherwise ValueError is
    raised. `y` can be bf16.
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
    """Recompute the LayerNorm of `total` into `y`, from its saved `mean` and `rstd`."""

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
    """Write the gradients of the inputs, given those of `y` and, directly, of `total`."""

def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignored: int,
    gradient: bool,
    scale: float,
    losses: Tensor,
    threads: int,
) -> None:
    """Write the cross-entropy of logits [rows, classes] and int64 targets [rows] to `losses`.

    The loss of a target equal to `ignored` is 0. gradient: overwrite the logits with the gradient
    of the sum of the losses, times `scale`. Raises IndexError for a target that is not a class.
    """

def attention_is_fast() -> bool:
    """Return whether `attention_forward` is fast with this processor's vector instructions."""

def attention_forward(
    qkv: Tensor, heads: int, time: int, y: Tensor, log_sums: Tensor, threads: int
) -> None:
    """Write the causal attention of qkv [B, T, 3C] to `y` [B, T, C], both fp32 or both bf16.

    The log-sum-exp of the scores of each row is written to log_sums [B, H, T].
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
    """Write the gradient of `qkv` to `grad_qkv`, given that of `y`."""

def add_rows(ids: Tensor, values: Tensor, table: Tensor, threads: int) -> None:
    """Add values [n, columns] to the rows of `table` selected by int64 `ids` [n], in this order.

    Raises IndexError for an id that is not a row of `table`.
    """

def adamw(
    rows: Sequence[tuple[int, ...]],
    rates: Sequence[tuple[float, ...]],
    max_norm: float,
    threads: int,
) -> float:
    """Clip the gradients, do an AdamW step, and return the gradient norm before clipping.

    If the norm is not finite, nothing is changed.

    rows: for each parameter, its number of elements and the addresses of the parameter, gradient,
    exp_avg, exp_avg_sq and step. All must be contiguous fp32, which is not checked.
    rates: for each parameter, lr, beta1, beta2, eps and weight decay.
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
    instruction_set: str | None = ...,
) -> None:
    """Write the matrix product op(a) · op(b) to `c`: [M, K] · [K, N] = [M, N].

    op transposes its argument or not. All tensors are fp32 CPU tensors with unit stride within rows
    and any stride between rows; with `bf16`, the matrices can also be bf16. `c` and `pre` must not
    overlap any other tensor. PyTorch's own thread pool is used, and the number of threads does not
    affect the result. The operation is not recorded by autograd.

    Args:
        transpose_a: `a` is stored as [K, M].
        transpose_b: `b` is stored as [N, K], like the weight of a linear layer.
        accumulate: add to `c`, which must be fp32, and to `row_sums`; not supported with GELU.
        bias: [N], added to each row.
        gelu: write gelu(product + bias), with the tanh approximation.
        pre: [M, N], with `gelu`: receives product + bias.
        gelu_grad: [M, N]: multiply the product by the derivative of gelu at these values.
        gelu_b: use gelu(b) in place of b.
        row_sums: [M], receives the sums of the rows of op(a), which are the gradient of a bias if
            the product is the gradient of its weight.
        bf16: round the operands to bf16; products are accumulated in fp32.
        instruction_set: "portable", "avx2", "avx512", or for products in bf16 "bf16-portable" or
            "bf16-avx512"; by default the best for this processor.

    Raises ValueError for other arguments.
    """

def gemm_is_faster(bf16: bool) -> bool:
    """Return whether `gemm` is expected to be faster than PyTorch's matmul, in fp32 or in bf16.

    This is the case in fp32 on AMD processors with AVX2, and in bf16 on processors with AVX512-BF16
    and without AMX.
    """

def pool_array(
    shape: Sequence[int], bf16: bool = ...
) -> NDArray[np.float32] | NDArray[np.uint16] | None:
    """Return an uninitialised array from the memory pool, or None if it cannot provide one.

    bf16: return a uint16 array for the bits of bf16 values, instead of fp32.
    """

def pool_usage() -> tuple[int, int]:
    """Return the peak extent of the pool since `trim_pool` and the memory in use, in bytes."""

def trim_pool() -> None:
    """Return the pool's unused memory to the system."""

class Generation:
    """The state of an engine that generates continuations of prompts."""

    def read(self, vocab_size: int) -> NDArray[np.float32]:
        """Process the pending tokens; return the next-token logits [rows, vocab_size].

        Rows that have ended are left out.
        """

    def step(self) -> list[int] | None:
        """Generate and return the next token of each row, or None if generation is complete."""

    def end(self, row: int) -> None:
        """Finish a row: nothing more is computed for it."""

    def logprobs(self) -> list[float]:
        """Return the model's log-probability of the last token of each row, in nats."""

class Engine:
    """GPT-2 inference on a CPU without PyTorch; see fastgpt/inference/engine.py."""

    def __init__(
        self,
        config: dict[str, Any],
        dtype: str,
        group: int,
        threads: int,
        instruction_set: str,
        weights: Mapping[str, Tensor | tuple[Tensor, Tensor]],
    ) -> None:
        """Create an engine with a copy of the weights.

        dtype: "float32", "bfloat16", "int8" or "int4".
        group: number of weights that share a scale in "int4", 32 or 64.
        instruction_set: "best" or one of `engine_instruction_sets`.
        weights: fp32 tensors, or pairs of integers and scales as returned by `quantize`. Missing
        biases are zeros.

        Raises ValueError that names a weight that is missing, unknown, of another shape or dtype,
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
        """Start generating `copies` continuations of each prompt; prompts can differ in length.

        settings: temperature, top_k (0: all), top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty.
        seeds: one per row.
        """

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [tokens, vocab_size] of the token after each position."""

    def matrix(
        self, name: str
    ) -> NDArray[np.float32] | tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return a matrix as stored: floats, or integers and scales (two-dimensional)."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """Return a bias (zero-padded to a multiple of 32), LayerNorm weights, or positions."""

    def multiply(self, name: str, x: Tensor, rows: int) -> NDArray[np.float32]:
        """Return the product of x [rows, K] and a matrix, plus its bias. For testing one kernel."""

    @property
    def threads(self) -> int: ...
    @property
    def bytes_per_token(self) -> int: ...

def quantize(
    weights: Tensor, outputs: int, dtype: str, group: int, threads: int, name: str = "weights"
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize weights [outputs, K] to "int8" or "int4".

    name: name of the weights in error messages.

    Returns: the integers (as bytes) and the scales, row by row. Raises ValueError if the weights
    are not finite.
    """

MOST_THREADS: int  # maximum number of threads of an engine

def engine_instruction_sets() -> list[str]:
    """Return the names of the instruction sets that engines can use on this processor."""
