"""The compiled matrix product compared to float64, for all options and instruction sets."""

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt import _C


def _runs(isa: str) -> bool:
    one = torch.ones(1, 1)
    try:
        _C.gemm(one, one, torch.empty(1, 1), instruction_set=isa)
    except ValueError:
        return False
    return True


ISAS = [isa for isa in ("portable", "avx2", "avx512") if _runs(isa)]
BF16_ISAS = [isa for isa in ("bf16-portable", "bf16-avx512") if _runs(isa)]
DTYPES = (torch.float32, torch.bfloat16)
FORMS = list(itertools.product((False, True), (False, True), (False, True)))
EPSILON = torch.finfo(torch.float32).eps
A, B, C = torch.zeros(4, 3), torch.zeros(3, 5), torch.zeros(4, 5)

# Sizes around those of panels, tiles, blocks and chunks, and GPT-2's odd ones.
SHAPES = [
    (1, 1, 1), (5, 7, 3), (6, 16, 8), (7, 17, 9), (96, 768, 256), (97, 769, 257), (191, 65, 255),
    (65, 128, 768), (12, 33, 514), (100, 2000, 1030), (13, 200, 4200), (30, 4111, 300),
]  # fmt: skip


def operand(rows: int, columns: int, transposed: bool, padding: int = 0) -> Tensor:
    """Return a random matrix, stored directly or transposed, with `padding` between the rows."""
    shape = (columns, rows) if transposed else (rows, columns)
    return torch.randn(shape[0], shape[1] + padding)[:, : shape[1]]


def product(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    return (a.T if transpose_a else a) @ (b.T if transpose_b else b)


def error_bound(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    """Return an upper bound of the rounding error of each element, for any order of summation."""
    depth = a.size(0) if transpose_a else a.size(1)
    sizes = product(a.double().abs(), b.double().abs(), transpose_a, transpose_b)
    return sizes * EPSILON * (math.sqrt(depth) + 3)


def check(
    m: int, n: int, k: int, form: tuple[bool, bool, bool], isa: str, padding: int = 0
) -> None:
    transpose_a, transpose_b, accumulate = form
    a, b = operand(m, k, transpose_a, padding), operand(k, n, transpose_b, padding)
    whole = torch.randn(m, n + padding)
    before, c = whole.clone(), whole[:, :n]
    truth = product(a.double(), b.double(), transpose_a, transpose_b)
    bound = error_bound(a, b, transpose_a, transpose_b)
    if accumulate:
        truth, bound = truth + c, bound + (truth + c).abs() * EPSILON + EPSILON
    else:
        c.fill_(math.nan)
    _C.gemm(
        a, b, c,
        transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate,
        threads=2, instruction_set=isa,
    )  # fmt: skip
    assert ((c - truth).abs() <= bound).all()
    assert torch.equal(whole[:, n:], before[:, n:]), "wrote outside of C"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_forms(shape: tuple[int, int, int], isa: str) -> None:
    for form, padding in itertools.product(FORMS, (0, 3)):
        check(*shape, form, isa, padding)


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    k=st.integers(1, 200),
    form=st.sampled_from(FORMS),
    padding=st.sampled_from([0, 1, 16]),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(
    m: int, n: int, k: int, form: tuple[bool, bool, bool], padding: int, isa: str
) -> None:
    check(m, n, k, form, isa, padding)


@pytest.mark.parametrize(("m", "n", "k"), [(192, 768, 768), (65, 128, 768), (768, 65, 128)])
def test_no_less_exact_than_pytorch(m: int, n: int, k: int) -> None:
    for transpose_a, transpose_b, _ in FORMS[::2]:
        a, b, c = operand(m, k, transpose_a), operand(k, n, transpose_b), torch.empty(m, n)
        truth = product(a.double(), b.double(), transpose_a, transpose_b)
        _C.gemm(a, b, c, transpose_a=transpose_a, transpose_b=transpose_b)
        theirs = product(a, b, transpose_a, transpose_b)
        assert (c - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(768, 384, 128), (65, 128, 768), (300, 2500, 1100), (7, 900, 3)])
def test_threads_change_no_bit(shape: tuple[int, int, int], isa: str) -> None:
    m, n, k = shape
    for transpose_a, transpose_b, _ in FORMS[::2]:
        a, b = operand(m, k, transpose_a), operand(k, n, transpose_b)
        results = []
        for threads in (1, 2, 3, 4):
            c, sums = torch.empty(m, n), torch.empty(m)
            _C.gemm(
                a, b, c,
                transpose_a=transpose_a, transpose_b=transpose_b,
                gelu_grad=torch.linspace(-3, 3, m * n).view(m, n), gelu_b=True, row_sums=sums,
                threads=threads, instruction_set=isa,
            )  # fmt: skip
            results.append((c, sums))
        for c, sums in results[1:]:
            assert torch.equal(c, results[0][0])
            assert torch.equal(sums, results[0][1])


# --- what is done on the way ----------------------------------------------------------------------

SIZES = [(5, 7, 3), (96, 256, 64), (101, 65, 128), (50, 800, 700), (4, 35, 0)]


def close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_bias_and_gelu(m: int, n: int, k: int, isa: str) -> None:
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / math.sqrt(k + 1), torch.randn(n)
    truth = F.linear(x.double(), weight.double(), bias.double())
    c, pre = torch.full((m, n), math.nan), torch.full((m, n), math.nan)
    _C.gemm(x, weight, c, transpose_b=True, bias=bias, threads=2, instruction_set=isa)
    close(c, truth)
    _C.gemm(x, weight, c, transpose_b=True, bias=bias, gelu=True, threads=2, instruction_set=isa)
    close(c, F.gelu(truth, approximate="tanh"))
    c.fill_(math.nan)
    _C.gemm(
        x, weight, c,
        transpose_b=True, bias=bias, gelu=True, pre=pre, threads=2, instruction_set=isa,
    )  # fmt: skip
    close(c, F.gelu(truth, approximate="tanh"))
    close(pre, truth)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_gradient_of_gelu(m: int, n: int, k: int, isa: str) -> None:
    grad, weight = torch.randn(m, k), torch.randn(k, n) / math.sqrt(k + 1)
    pre = torch.randn(m, n) * 3
    c = torch.full((m, n), math.nan)
    _C.gemm(grad, weight, c, gelu_grad=pre, threads=2, instruction_set=isa)
    at = pre.double().requires_grad_()
    F.gelu(at, approximate="tanh").backward(grad.double() @ weight.double())
    close(c, at.grad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradient_of_a_weight_and_a_bias(
    m: int, n: int, k: int, accumulate: bool, isa: str
) -> None:
    """The gradient of gelu(pre) · Wᵀ + bias, W [m, n], with GELU recomputed in the product."""
    grad, pre = torch.randn(k, m), torch.randn(k, n)
    c, sums = torch.randn(m, n), torch.randn(m)
    truth = grad.double().T @ F.gelu(pre.double(), approximate="tanh")
    true_sums = grad.double().sum(0)
    if accumulate:
        truth, true_sums = truth + c, true_sums + sums
    _C.gemm(
        grad, pre, c,
        transpose_a=True, gelu_b=True, row_sums=sums, accumulate=accumulate, threads=2,
        instruction_set=isa,
    )  # fmt: skip
    torch.testing.assert_close(c.double(), truth, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.double(), true_sums, rtol=1e-5, atol=1e-4)


def test_row_sums_of_a_matrix_as_it_is() -> None:
    a, sums = torch.randn(40, 700), torch.empty(40)
    _C.gemm(a, torch.randn(700, 900), torch.empty(40, 900), row_sums=sums, threads=2)
    torch.testing.assert_close(sums.double(), a.double().sum(1), rtol=1e-5, atol=1e-4)
    sums.fill_(math.nan)
    _C.gemm(a, torch.empty(700, 0), torch.empty(40, 0), row_sums=sums)
    torch.testing.assert_close(sums.double(), a.double().sum(1), rtol=1e-5, atol=1e-4)


# --- in bfloat16 ----------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """Return an operand rounded as by a bf16 product, in fp64."""
    return x.to(torch.bfloat16).double()


def check_bf16(
    m: int, n: int, k: int, form: tuple[bool, bool, bool], dtypes: tuple[torch.dtype, ...],
    isa: str, padding: int = 0,
) -> None:  # fmt: skip
    """Compare to fp64 on rounded operands: only fp32 sums and the result may round further."""
    transpose_a, transpose_b, accumulate = form
    a = operand(m, k, transpose_a, padding).to(dtypes[0])
    b = operand(k, n, transpose_b, padding).to(dtypes[1])
    whole = torch.randn(m, n + padding).to(dtypes[2])
    before, c = whole.clone(), whole[:, :n]
    truth = product(rounded(a), rounded(b), transpose_a, transpose_b)
    bound = 2 * error_bound(rounded(a), rounded(b), transpose_a, transpose_b)
    if accumulate:
        truth, bound = truth + c, bound + (truth + c).abs() * EPSILON + EPSILON
    else:
        c.fill_(math.nan)
    _C.gemm(
        a, b, c,
        transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate,
        threads=2, instruction_set=isa,
    )  # fmt: skip
    if dtypes[2] == torch.bfloat16:
        bound = bound + truth.abs() * 2**-8
    assert ((c - truth).abs() <= bound).all()
    assert torch.equal(whole[:, n:], before[:, n:]), "wrote outside of C"


def bf16_forms(dtype: torch.dtype) -> list[tuple[bool, bool, bool]]:
    return [form for form in FORMS if dtype == torch.float32 or not form[2]]


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("shape", [*SHAPES, (13, 40, 9001), (40, 90, 513)])
def test_all_forms_in_bf16(shape: tuple[int, int, int], isa: str) -> None:
    for dtypes in itertools.product(DTYPES, repeat=3):
        for form in bf16_forms(dtypes[2]):
            check_bf16(*shape, form, dtypes, isa, padding=3 if form[0] else 0)


@settings(max_examples=200, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    k=st.integers(1, 200),
    form=st.sampled_from(FORMS),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    padding=st.sampled_from([0, 1, 16]),
    isa=st.sampled_from(BF16_ISAS),
)
def test_any_shape_in_bf16(
    m: int, n: int, k: int, form: tuple[bool, bool, bool], dtypes: tuple[torch.dtype, ...],
    padding: int, isa: str,
) -> None:  # fmt: skip
    if form in bf16_forms(dtypes[2]):
        check_bf16(m, n, k, form, dtypes, isa, padding)


def close_bf16(ours: Tensor, truth: Tensor) -> None:
    tolerance = 2**-8 if ours.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, (50, 70, 1300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_gelu_in_bf16(m: int, n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / math.sqrt(k + 1), torch.randn(n)
    truth = F.linear(rounded(x), rounded(weight), bias.double())
    c, pre = (torch.full((m, n), math.nan, dtype=dtype) for _ in range(2))
    _C.gemm(x, weight, c, transpose_b=True, bias=bias, threads=2, instruction_set=isa)
    close_bf16(c, truth)
    _C.gemm(x, weight, c, transpose_b=True, bias=bias, gelu=True, threads=2, instruction_set=isa)
    close_bf16(c, F.gelu(truth, approximate="tanh"))
    c.fill_(math.nan)
    _C.gemm(
        x, weight, c,
        transpose_b=True, bias=bias, gelu=True, pre=pre, threads=2, instruction_set=isa,
    )  # fmt: skip
    close_bf16(c, F.gelu(truth, approximate="tanh"))
    close_bf16(pre, truth)


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, (50, 70, 1300)])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
def test_gradient_of_gelu_in_bf16(
    m: int, n: int, k: int, dtypes: tuple[torch.dtype, ...], isa: str
) -> None:
    grad, weight = torch.randn(m, k), torch.randn(k, n) / math.sqrt(k + 1)
    pre = (torch.randn(m, n) * 3).to(dtypes[0])
    c = torch.full((m, n), math.nan, dtype=dtypes[1])
    _C.gemm(grad, weight, c, gelu_grad=pre, threads=2, instruction_set=isa)
    at = pre.double().requires_grad_()
    F.gelu(at, approximate="tanh").backward(rounded(grad) @ rounded(weight))
    close_bf16(c, at.grad)


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, (33, 300, 257)])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_sums_of_operands_in_bf16(
    m: int, n: int, k: int, transpose_b: bool, dtype: torch.dtype, isa: str
) -> None:
    """GELU is computed in fp32 from the stored values and then rounded; sums add rounded values."""
    grad, pre = torch.randn(k, m).to(dtype), operand(k, n, transpose_b).to(dtype)
    c, sums = torch.empty(m, n), torch.empty(m)
    of_gelu = rounded(F.gelu(pre.double(), approximate="tanh").float())
    truth = product(rounded(grad), of_gelu, True, transpose_b)
    _C.gemm(
        grad, pre, c,
        transpose_a=True, transpose_b=transpose_b, gelu_b=True, row_sums=sums, threads=2,
        instruction_set=isa,
    )  # fmt: skip
    # GELU in fp32 may round to the neighboring bf16 value; the factor 3 allows for that.
    torch.testing.assert_close(c.double(), truth, rtol=1e-3, atol=3 * 3 * 2**-7)
    torch.testing.assert_close(sums.double(), rounded(grad).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_in_bf16(dtype: torch.dtype, isa: str) -> None:
    for m, n, k in [(768, 384, 128), (300, 2500, 1100), (7, 900, 3)]:
        a, b = torch.randn(m, k), torch.randn(n, k)
        results = []
        for threads in (1, 2, 3, 4):
            c = torch.empty(m, n, dtype=dtype)
            _C.gemm(a, b, c, transpose_b=True, gelu=True, threads=threads, instruction_set=isa)
            results.append(c)
        assert all(torch.equal(c, results[0]) for c in results)


def test_rounding_to_bf16_is_pytorchs() -> None:
    """Ties, overflow, infinities and NaN, tested with a product with 1 and fp32 sums."""
    bits = torch.arange(0x3F7FFFF0, 0x3F818010, 8).int()
    x = torch.cat([bits.view(torch.float32), torch.tensor([3.4e38, -3.4e38, math.inf, math.nan])])
    for isa in BF16_ISAS:
        for like in (x[:, None], x[None, :]):
            c = torch.empty(like.shape[0], like.shape[1], dtype=torch.bfloat16)
            ones = torch.ones(1, 1)
            operands = (like, ones) if like.size(1) == 1 else (ones, like)
            _C.gemm(*operands, c, instruction_set=isa)
            assert torch.equal(c.isnan(), like.isnan())
            finite = ~like.isnan()
            assert torch.equal(c[finite], like.to(torch.bfloat16)[finite])


def test_refuses_bf16_where_it_computes_in_fp32() -> None:
    with pytest.raises(ValueError, match="b must be of dtype float32"):
        _C.gemm(A, B.bfloat16(), C)
    with pytest.raises(ValueError, match="c must be of dtype float32 or bfloat16"):
        _C.gemm(A, B, C.half(), bf16=True)
    with pytest.raises(ValueError, match="bf16 requires a bf16 instruction set"):
        _C.gemm(A, B, C, bf16=True, instruction_set="portable")
    with pytest.raises(ValueError, match="accumulate requires c in float32"):
        _C.gemm(A, B, C.bfloat16(), accumulate=True, bf16=True)


# --- what is at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_no_terms_and_no_elements(isa: str) -> None:
    for transpose_a, transpose_b, accumulate in FORMS:
        for m, n, k in [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)]:
            a, b, c = operand(m, k, transpose_a), operand(k, n, transpose_b), torch.ones(m, n)
            _C.gemm(
                a, b, c,
                transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate,
                instruction_set=isa,
            )  # fmt: skip
            assert torch.equal(c, torch.ones(m, n) * accumulate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_go_where_they_belong(value: float, isa: str) -> None:
    for m, n, k in [(20, 50, 300), (96, 256, 256)]:
        a, b, c = torch.rand(m, k) + 1, torch.rand(k, n) + 1, torch.empty(m, n)
        a[m - 1, k - 1] = value
        b[0, n - 1] = value
        _C.gemm(a, b, c, threads=2, instruction_set=isa)
        assert c[:-1, :-1].isfinite().all()
        odd = torch.cat([c[-1], c[:, -1]])
        assert (odd.isnan() if math.isnan(value) else odd == value).all()
        _C.gemm(a, b, c, gelu=True, threads=2, instruction_set=isa)
        odd = torch.cat([c[-1], c[:, -1]])
        assert (odd.isnan() if math.isnan(value) else odd == value).all()


def test_a_vector_in_a_matrix_may_have_any_stride_along_one() -> None:
    column, row = torch.randn(30, 4)[:, 1:2], torch.randn(4, 30).T[1:2, :3]
    c = torch.empty(30, 1)
    _C.gemm(column, torch.full((1, 1), 2.0), c)
    assert torch.equal(c, 2 * column)
    with pytest.raises(ValueError, match="contiguous rows"):
        _C.gemm(row, torch.randn(3, 1), torch.empty(1, 1))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((A, B, C.T), {}, "contiguous rows"),
        ((A, torch.zeros(5, 3), C), {}, r"b has shape \[5, 3\], not \[3, 5\]"),
        ((A, B, torch.zeros(3, 5)), {}, "c has 3 rows, but the product has 4"),
        ((A[0], B, C), {}, "a must have 2 dimension"),
        ((A.double(), B, C), {}, "a must be of dtype float32"),
        ((A.half(), B, C), {}, "a must be of dtype float32"),
        ((A.to("meta"), B, C), {}, "a must be of dtype float32 and on the CPU"),
        ((A.numpy(), B, C), {}, "a must be a torch.Tensor"),
        ((A, B, A[:1, :1].expand(4, 5)), {}, "c "),
        ((A, B, C), {"bias": torch.zeros(4)}, "bias has 4 elements, not 5"),
        ((A, B, C), {"row_sums": torch.zeros(5)}, "row_sums has 5 elements, not 4"),
        ((A, B, C), {"gelu": True, "pre": torch.zeros(5, 4)}, "pre has shape"),
        ((A, B, C), {"pre": C}, "requires gelu"),
        ((A, B, C), {"gelu": True, "gelu_grad": C}, "cannot be combined"),
        ((A, B, C), {"accumulate": True, "gelu": True}, "accumulate"),
        ((A, B, C), {"instruction_set": "sse9"}, "instruction_set must be"),
    ],
)
def test_refuses(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.gemm(*arguments, **options)


def test_parameters_and_results_of_autograd_are_tensors_too() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True) * 2, torch.nn.Parameter(torch.randn(5, 3))
    c = torch.empty(4, 5)
    _C.gemm(x, weight, c, transpose_b=True)
    close(c, F.linear(x.detach().double(), weight.detach().double()))
    assert not c.requires_grad


def test_calls_from_two_threads_at_once() -> None:
    a, b = torch.randn(200, 700), torch.randn(700, 900)
    truth = torch.empty(200, 900)
    _C.gemm(a, b, truth)

    def many(threads: int) -> bool:
        c = torch.empty(200, 900)
        same = True
        for _ in range(15):
            _C.gemm(a, b, c.fill_(0), threads=threads)
            same &= torch.equal(c, truth)
        return same

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(many, (1, 2, 2)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_process() -> None:
    """On one thread, like PyTorch: a fork does not copy the other threads of OpenMP's team."""
    a, b, truth = torch.randn(90, 300), torch.randn(300, 400), torch.empty(90, 400)
    _C.gemm(a, b, truth, threads=2)
    child = os.fork()
    if child == 0:
        c = torch.empty(90, 400)
        _C.gemm(a, b, c)
        os._exit(0 if torch.equal(c, truth) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_says_where_it_is_faster() -> None:
    if _C.gemm_is_faster(bf16=False):
        assert "avx2" in ISAS
    if _C.gemm_is_faster(bf16=True):
        assert "bf16-avx512" in BF16_ISAS
