"""The fused AdamW against PyTorch's clipping and AdamW, in float64 and in fp32."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from fastgpt.kernels import adamw
from fastgpt.training import fused_adamw
from fastgpt.training.fused_adamw import FusedAdamW
from tests.kernels.truth import HAS_GPU, assert_as_good_as_plain

# One element, less and more than a block, whole blocks; unaligned and aligned sizes.
SHAPES = [(), (1,), (3, 5), (16,), (2048,), (64, 64), (2049,), (4099,)]
ALIGNED = [(16,), (2048,), (64, 80)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture(autouse=True, params=["kernels"] if HAS_GPU else ["kernels", "loops"])
def implementation(request, monkeypatch):
    """Without a GPU, test both the kernels, in Triton's interpreter, and the CPU implementation."""
    loops = request.param == "loops"
    monkeypatch.setattr(fused_adamw, "_uses_cpp", lambda param: loops)
    return request.param


@pytest.fixture
def _kernels_alone(implementation):
    if implementation != "kernels":
        pytest.skip("a test of the kernels")


def make_params(shapes=SHAPES, device="cpu"):
    return [torch.randn(shape).to(device).requires_grad_() for shape in shapes]


def groups_of(params):
    """Return two parameter groups with different learning rates."""
    return [
        {"params": params[::2], "weight_decay": 0.1},
        {"params": params[1::2], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.999)},
    ]


def copies(params, dtype):
    return [param.detach().clone().to(dtype).requires_grad_() for param in params]


def set_gradients(step, *copies_of_params):
    """Set the same random gradients in each copy, with a very different scale every third step."""
    generator = torch.Generator().manual_seed(step)
    for same in zip(*copies_of_params, strict=True):
        grad = torch.randn(same[0].shape, generator=generator) * (10.0 if step % 3 else 1e-3)
        for param in same:
            param.grad = grad.to(param.device, param.dtype)


def torch_step(optimizer, params, max_norm):
    norm = nn.utils.clip_grad_norm_(params, math.inf if max_norm is None else max_norm)
    optimizer.step()
    return norm


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e9])
@pytest.mark.parametrize("shapes", [SHAPES, ALIGNED], ids=["odd", "aligned"])
def test_as_good_as_torch(shapes, max_norm, device):
    params = make_params(shapes, device)
    plain, true = copies(params, torch.float32), copies(params, torch.float64)
    optimizer = FusedAdamW(groups_of(params), **OPTIONS, max_norm=max_norm)
    references = [torch.optim.AdamW(groups_of(some), **OPTIONS) for some in (plain, true)]
    for step in range(5):
        set_gradients(step, params, plain, true)
        assert optimizer.step() is None
        torch_step(references[0], plain, max_norm)
        norm = torch_step(references[1], true, max_norm)
        torch.testing.assert_close(optimizer.grad_norm, norm.float(), rtol=1e-6, atol=0)
    for mine, reference, exact in zip(params, plain, true, strict=True):
        assert_as_good_as_plain(mine.detach(), reference.detach(), exact.detach(), "parameter")
        for name in ("exp_avg", "exp_avg_sq"):
            states = (
                optimizer.state[mine],
                references[0].state[reference],
                references[1].state[exact],
            )
            assert_as_good_as_plain(*(state[name] for state in states), name)
        assert optimizer.state[mine]["step"] == 5


def test_a_model_learns_the_same_for_fifty_steps(device):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1)).to(device)
    reference = copy.deepcopy(model)
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_norm=0.5)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    x = torch.randn(32, 6, device=device)
    y = x.sin().sum(1, keepdim=True)
    for step in range(50):
        for some, rates in ((model, optimizer), (reference, theirs)):
            rates.param_groups[0]["lr"] = 1e-2 * (1 - step / 60)  # learning rate schedule
            rates.zero_grad()
            (some(x) - y).square().mean().backward()
        optimizer.step()
        norm = torch_step(theirs, reference.parameters(), 0.5)
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-4, atol=0)
    for mine, same in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, -1])
def test_a_norm_that_is_not_finite_changes_nothing(bad, which, device):
    params = make_params([(3, 5), (2049,)], device)
    optimizer = FusedAdamW(params, max_norm=1.0)
    set_gradients(0, params)
    optimizer.step()
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    params[which].grad.view(-1)[-1] = bad
    optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    for param, same in zip(params, before[0], strict=True):
        assert torch.equal(param, same)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], before[1][index][name]) for name in state)
    set_gradients(1, params)
    optimizer.step()  # the skipped step has no effect on the next one
    assert optimizer.grad_norm.isfinite()
    assert optimizer.state[params[0]]["step"] == 2


def test_zero_gradients_only_decay(device):
    params = make_params([(3, 5)], device)
    expected = params[0].detach() * (1 - 0.1 * 0.5)
    params[0].grad = torch.zeros_like(params[0])
    optimizer = FusedAdamW(params, lr=0.1, weight_decay=0.5, max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0.0
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-6, atol=0)


def test_betas_of_zero(device):
    params = make_params([(3, 5)], device)
    plain = copies(params, torch.float32)
    optimizer = FusedAdamW(params, betas=(0.0, 0.0))
    reference = torch.optim.AdamW(plain, betas=(0.0, 0.0))
    for step in range(2):
        set_gradients(step, params, plain)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=1e-7)


def test_parameters_without_a_gradient_are_skipped(device):
    params = make_params([(3,), (4,), (5,), (0, 4)], device)
    before = params[1].detach().clone()
    optimizer = FusedAdamW([{"params": params[1:2]}, {"params": [params[0], *params[2:]]}])
    optimizer.step()  # no parameter has a gradient
    assert optimizer.grad_norm is None
    set_gradients(0, params)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    set_gradients(1, params)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2.0, 1.0, 2.0, 2.0]
    assert not torch.equal(params[1], before)


def test_tensors_that_lie_anywhere(device):
    """Views at unaligned addresses, transposed parameters, gradients of other strides and of 0."""
    storage = torch.randn(200, device=device)
    params = [
        storage[1:31].view(5, 6),
        torch.randn(6, 5, device=device).T,
        torch.randn(2, 3, 4, device=device).permute(2, 0, 1),
        torch.randn(1, 7, device=device)[:, :7],
    ]
    params = [param.requires_grad_() for param in params]
    plain = copies(params, torch.float32)
    optimizer, reference = FusedAdamW(params, max_norm=1.0), torch.optim.AdamW(plain)
    around = storage.detach()[[0, *range(31, 200)]].clone()
    for step in range(3):
        set_gradients(step, params, plain)
        params[0].grad = params[0].grad.T.contiguous().T
        params[2].grad = torch.ones((), device=device).expand(4, 2, 3)
        plain[2].grad = torch.ones(4, 2, 3, device=device)
        optimizer.step()
        torch_step(reference, plain, 1.0)
    for mine, same in zip(params, plain, strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-5, atol=1e-6)
    assert torch.equal(storage.detach()[[0, *range(31, 200)]], around)


def test_gradients_stay_as_they_are(device):
    params = make_params([(3, 5)], device)
    set_gradients(1, params)
    before = params[0].grad.clone()
    FusedAdamW(params, max_norm=0.1).step()
    assert torch.equal(params[0].grad, before)


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_states_move_from_and_to_torch(kind, device):
    def steps(optimizer, params, numbers):
        for step in numbers:
            set_gradients(step, params)
            optimizer.step()

    params = make_params([(3, 5), (16,), (2049,)], device)
    plain, again = copies(params, torch.float32), copies(params, torch.float32)
    ours = FusedAdamW(groups_of(params), **OPTIONS)
    theirs = torch.optim.AdamW(groups_of(plain), **OPTIONS, **kind)
    steps(ours, params, range(3))
    steps(theirs, plain, range(3))
    names = [set(some.state_dict()["state"][0]) for some in (ours, theirs)]
    assert names[0] == names[1] == {"step", "exp_avg", "exp_avg_sq"}

    from_theirs = FusedAdamW(groups_of(plain), lr=1.0)
    from_theirs.load_state_dict(theirs.state_dict())
    for mine, same in zip(again, params, strict=True):
        mine.data.copy_(same)
    from_ours = torch.optim.AdamW(groups_of(again), lr=1.0, **kind)
    from_ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer, some in ((ours, params), (from_theirs, plain), (from_ours, again)):
        steps(optimizer, some, range(3, 5))
        assert optimizer.state[some[0]]["step"] == 5
        for mine, same in zip(some, params, strict=True):
            torch.testing.assert_close(mine, same, rtol=1e-5, atol=1e-6)


def test_a_state_put_in_by_hand(device):
    """As when loading a checkpoint: steps on the CPU, contiguous moments."""
    param = torch.randn(6, 5, device=device).T.requires_grad_()
    optimizer = FusedAdamW([param])
    zeros = torch.zeros(5, 6, device=device)
    optimizer.state[param] = {"step": torch.tensor(4.0), "exp_avg": zeros, "exp_avg_sq": zeros + 1}
    plain = param.detach().clone().requires_grad_()
    reference = torch.optim.AdamW([plain])
    reference.state[plain] = copy.deepcopy(optimizer.state[param])
    set_gradients(0, [param], [plain])
    optimizer.step()
    reference.step()
    torch.testing.assert_close(param, plain, rtol=1e-6, atol=1e-7)


def test_refuses_states_that_it_would_not_continue(device):
    params = make_params([(3,)], device)
    for option in ("amsgrad", "maximize"):
        other = torch.optim.AdamW(copies(params, torch.float32), **{option: True})
        with pytest.raises(ValueError, match=f"made with {option}=True"):
            FusedAdamW(params).load_state_dict(other.state_dict())


def test_a_copy_keeps_all(device):
    params = make_params([(3,)], device)
    optimizer = FusedAdamW(params, max_norm=0.25)
    set_gradients(0, params)
    optimizer.step()
    copied, same = copy.deepcopy((optimizer, params))
    set_gradients(1, params, same)
    optimizer.step()
    copied.step()
    assert copied.max_norm == 0.25
    assert torch.equal(params[0], same[0])


def test_rate_as_a_tensor(device):
    params = make_params([(3, 5), (7,)], device)
    plain = copies(params, torch.float32)
    rate = torch.tensor(0.1, device=device)
    optimizer = FusedAdamW([{"params": params[:1], "lr": 1e-3}, {"params": params[1:]}], lr=rate)
    reference = torch.optim.AdamW(
        [{"params": plain[:1], "lr": 1e-3}, {"params": plain[1:]}], lr=0.1
    )
    for step in range(3):
        set_gradients(step, params, plain)
        rate.fill_(0.1 / (step + 1))  # in place, so that a captured step uses it as well
        reference.param_groups[1]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_kernels_alone")
def test_addresses_are_told_again_only_when_one_has_changed(device, monkeypatch):
    told = []
    real = adamw.make_tensor_tables
    monkeypatch.setattr(
        adamw, "make_tensor_tables", lambda *a, **b: told.append(1) or real(*a, **b)
    )
    params = make_params([(3, 5), (7,)], device)
    plain = copies(params, torch.float32)
    optimizer, reference = FusedAdamW(params), torch.optim.AdamW(plain)
    for step, expected in enumerate([1, 1, 2]):
        set_gradients(step, plain)
        for param, same in zip(params, plain, strict=True):
            if param.grad is None or step == 2:
                param.grad = same.grad.clone()
            param.grad.copy_(same.grad)
        optimizer.step()
        reference.step()
        assert len(told) == expected
    torch.testing.assert_close(params, plain, rtol=1e-5, atol=1e-6)


def test_same_steps_give_the_same_bits(device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        params = make_params(device=device)
        optimizer = FusedAdamW(params, max_norm=1.0)
        for step in range(2):
            set_gradients(step, params)
            optimizer.step()
        results.append([*params, optimizer.grad_norm])
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("_kernels_alone")
def test_more_blocks_and_tensors_than_one_round_of_the_preparing_program(device, monkeypatch):
    monkeypatch.setattr(adamw, "PREPARE", replace(adamw.PREPARE, constants={"BLOCK": 4}))
    params = make_params([(3,)] * 9 + [(10_000,)], device)
    plain = copies(params, torch.float32)
    set_gradients(1, params, plain)
    optimizer = FusedAdamW(params, max_norm=1.0)
    optimizer.step()
    norm = torch_step(torch.optim.AdamW(plain), plain, 1.0)
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(params, plain, rtol=1e-5, atol=1e-6)


def test_optimizer_refuses_what_it_does_not_support(device):
    params = make_params([(3,)], device)
    with pytest.raises(ValueError, match=r"must be torch\.float32, not torch\.bfloat16"):
        FusedAdamW([params[0].detach().bfloat16()])
    with pytest.raises(ValueError, match=r"must be torch\.float32, not torch\.float64"):
        FusedAdamW(params).add_param_group({"params": [params[0].detach().double()]})
    with pytest.raises(ValueError, match=r"max_norm must be positive, or None, not 0"):
        FusedAdamW(params, max_norm=0)
    with pytest.raises(ValueError, match="learning rate"):
        FusedAdamW(params, lr=-1.0)


@pytest.mark.usefixtures("_kernels_alone")
def test_launcher_refuses_what_it_does_not_support(device):
    param = torch.zeros(3, 4, device=device)
    step = torch.zeros((), device=device)
    tensors_of = adamw.make_tensor_tables
    with pytest.raises(ValueError, match=r"the same length, .* not \[1, 1, 1, 1, 0\]"):
        tensors_of([param], [param], [param], [param], [])
    with pytest.raises(ValueError, match=r"the same length, .* not \[0, 0, 0, 0, 0\]"):
        tensors_of([], [], [], [], [])
    with pytest.raises(ValueError, match=r"a gradient must be torch\.float32, not torch\.float16"):
        tensors_of([param], [param.half()], [param], [param], [step])
    with pytest.raises(ValueError, match=r"exp_avg must have shape \[3, 4\] .* not shape \[4, 3\]"):
        tensors_of([param], [param], [param.T], [param], [step])
    with pytest.raises(ValueError, match=r"a step must have shape \[\] .* not shape \[1\]"):
        tensors_of([param], [param], [param], [param], [step[None]])
    with pytest.raises(ValueError, match=r"gaps or overlaps, not \[3, 2\] strided \[4, 2\]"):
        tensors_of(*[[param[:, ::2]]] * 4, [step])
    with pytest.raises(ValueError, match=r"gaps or overlaps, not \[2, 3, 4\] strided \[0, 4, 1\]"):
        tensors_of(*[[param.expand(2, 3, 4)]] * 4, [step])
    with pytest.raises(ValueError, match=r"one device, not a gradient on meta"):
        tensors_of([param], [param.to("meta")], [param], [param], [step])
    tensors = tensors_of([param], [param], [param], [param], [step])
    with pytest.raises(ValueError, match=r"torch\.float64 \[1, 5\], lr, .* not torch\.float32"):
        adamw.adamw(tensors, torch.zeros(1, 5, device=device))
    with pytest.raises(ValueError, match=r"\[1, 5\].* not torch\.float64 \[2, 5\]"):
        adamw.adamw(tensors, torch.zeros(2, 5, device=device, dtype=torch.float64))


@pytest.mark.skipif(not HAS_GPU, reason="only CUDA has graphs")
def test_records_into_a_cuda_graph():
    params = make_params(device="cuda")
    plain = copies(params, torch.float32)
    rate = torch.tensor(1e-2, device="cuda")
    optimizer = FusedAdamW(params, lr=rate, max_norm=1.0)
    reference = torch.optim.AdamW(plain, lr=1e-2)
    graph = torch.cuda.CUDAGraph()
    static = [torch.zeros_like(param) for param in params]
    for step in range(5):
        set_gradients(step, plain)
        for param, same, grad in zip(params, plain, static, strict=True):
            param.grad = grad.copy_(same.grad)
        rate.fill_(1e-2 / (step + 1))
        reference.param_groups[0]["lr"] = 1e-2 / (step + 1)
        torch_step(reference, plain, 1.0)
        if step == 0:
            optimizer.step()
            continue
        if step == 1:
            with torch.cuda.graph(graph):
                optimizer.step()
        graph.replay()
    torch.testing.assert_close(params, plain, rtol=1e-5, atol=1e-6)


def test_on_a_cpu_the_threads_change_no_bit():
    if HAS_GPU:
        pytest.skip("a test of the CPU's loops")
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        params = make_params([(300, 700), (7,), (50_001,)])
        optimizer = FusedAdamW(groups_of(params), **OPTIONS, max_norm=1.0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for step in range(2):
                set_gradients(step, params)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        results.append([*params, optimizer.grad_norm])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_parameter_with_gaps_is_refused(device):
    storage = torch.zeros(3, 4, device=device)
    param = storage[:, ::2].requires_grad_()
    param.grad = torch.ones(3, 2, device=device)
    with pytest.raises(ValueError, match=r"gaps or overlaps, not \[3, 2\] strided \[4, 2\]"):
        FusedAdamW([param]).step()


def test_tensors_without_memory_are_refused(implementation):
    if implementation != "loops":
        pytest.skip("a test of the loops")
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="cannot be traced on a CPU"):
            FusedAdamW([param]).step()
