"""AdamW and gradient clipping in one pass over all parameters: Triton kernels, or C++ on a CPU."""

import sys
from importlib import import_module
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastgpt.utils.extension import _C

State = dict[str, Tensor]


class FusedAdamW(torch.optim.AdamW):
    """`clip_grad_norm_` and `torch.optim.AdamW` in one `step`.

    On CUDA that is `fastgpt.kernels.adamw`, on a CPU csrc/training/adamw.cpp.

    params, lr, betas, eps, weight_decay: as for AdamW, groups of parameters too; fp32, all on one
    device. max_norm: gradients of a larger norm count as if scaled down to it (None: never). After
    a step `grad_norm` is what the norm was, a scalar on the device. If it is not finite, the step
    changes nothing, counts included. `.grad` itself is never changed.

    States are exchanged with `torch.optim.AdamW` through `state_dict`, both ways. To record steps
    into a CUDA graph, make `lr` a tensor on the device, do a step before the capture, and keep the
    gradients where they are: ``zero_grad(set_to_none=False)``.
    """

    grad_norm: Tensor | None = None
    _tensors: Any = None  # kernels.adamw.Tensors of the last step, and what it was made for
    _made_for: tuple[int, ...] = ()
    _hyper: Tensor | None = None  # fp64 [n, 5], likewise
    _hyper_values: tuple[tuple[float, ...], ...] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm must be positive, or None, not {max_norm}")
        self.max_norm = max_norm
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale, and to skip, itself
        self._recorded: list[Any] = []  # what CUDA graphs still read

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with rates of their own; ValueError unless all are fp32."""
        _plain("add_param_group")(self, param_group)
        _check_dtypes(self.param_groups[-1]["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or make them zero where they are."""
        _plain("zero_grad")(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.AdamW` does."""
        return _plain("state_dict")(self)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class or of `torch.optim.AdamW`."""
        _plain("load_state_dict")(self, state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; nothing waits for the device."""
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        params = [p for group in groups for p in group]
        if not params:
            return
        states = [self._state(p) for p in params]
        grads = [_laid_out_as(p, p.grad) for p in params if p.grad is not None]
        max_norm = float("inf") if self.max_norm is None else self.max_norm
        step = self._step_on_cpu if _uses_loops(params[0]) else self._step_of_kernels
        self.grad_norm = step(groups, params, grads, states, max_norm)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which torch's own would leave without `max_norm`."""
        return super().__getstate__() | {"max_norm": self.max_norm, "_recorded": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over loaded state; that of any kind of `torch.optim.AdamW` will do."""
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "differentiable"):
                if group[option]:
                    raise ValueError(
                        f"FusedAdamW: a state made with {option}=True is not supported"
                    )
            group.update(fused=True, foreach=None, capturable=False)

    def _step_on_cpu(
        self,
        groups: list[list[Tensor]],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        max_norm: float,
    ) -> Tensor:
        rates = [
            (float(group["lr"]), *_rates_of(group)[1:])
            for group, some in zip(self.param_groups, groups, strict=True)
            for _ in some
        ]
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        if torch._C._len_torch_dispatch_stack():  # no memory behind a fake tensor, for example
            raise RuntimeError("FusedAdamW cannot be traced on a CPU: use torch.optim.AdamW there")
        rows = [
            (tensors[0].numel(), *(tensor.data_ptr() for tensor in tensors))
            for tensors in zip(params, grads, *moments, strict=True)
        ]
        return torch.tensor(_C.adamw(rows, rates, max_norm, torch.get_num_threads()))

    def _step_of_kernels(
        self,
        groups: list[list[Tensor]],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        max_norm: float,
    ) -> Tensor:
        adamw = import_module("fastgpt.kernels.adamw")  # here, because Triton is optional
        tensors = self._find(adamw, params, grads, states)
        hyper = self._rates(adamw, groups, params[0])
        if _recording(params[0]):
            self._recorded += [tensors, hyper]
        norm: Tensor = adamw.adamw(tensors, hyper, max_norm)
        return norm

    def _state(self, param: Tensor) -> State:
        """Return a parameter's step count and moments, made when first asked for."""
        state: State = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        step = state["step"]
        if step.device != param.device or step.dtype != torch.float32:  # AdamW may keep it on a CPU
            state["step"] = step.to(param.device, torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):  # loading may have changed the strides
            state[name] = _laid_out_as(param, state[name])
        return state

    def _find(
        self, adamw: Any, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> Any:
        """Return where all tensors are, told to the device again only if one has moved."""
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        rows = (params, grads, *moments)
        made_for = tuple(tensor.data_ptr() for row in rows for tensor in row)
        if self._tensors is None or made_for != self._made_for:
            _refuse_while_recording(params[0], "a tensor of it has moved since the last step")
            n, n_before = len(params), len(self._made_for) // len(rows)
            same = n == n_before and made_for[:n] == self._made_for[:n]
            self._tensors = adamw.tensors_of_a_step(*rows, before=self._tensors if same else None)
            self._made_for = made_for
        return self._tensors

    def _rates(self, adamw: Any, groups: list[list[Tensor]], param: Tensor) -> Tensor:
        """Return each parameter's rates on the device, told to it again only if one has changed.

        A rate that is a tensor is copied there at each step: without a wait, and in a CUDA graph.
        """
        values = tuple(_rates_of(group) for group in self.param_groups)
        values = tuple(v for v, group in zip(values, groups, strict=True) for _ in group)
        if self._hyper is None or values != self._hyper_values:
            _refuse_while_recording(param, "a rate that is no tensor has changed")
            self._hyper = adamw.to_device(torch.tensor(values, dtype=torch.float64), param.device)
            self._hyper_values = values
        done = 0
        for group, params in zip(self.param_groups, groups, strict=True):
            if isinstance(group["lr"], Tensor):
                self._hyper[done : done + len(params), 0] = group["lr"]
            done += len(params)
        return self._hyper


def _plain(name: str) -> Any:
    """Return a method of torch's optimizers without what keeps torch.compile out of it.

    That would load the compiler only to keep it out: two seconds, and 150 MB for good.
    """
    method = getattr(torch.optim.Optimizer, name)
    return method if "torch._dynamo" in sys.modules else unwrap(method)


def _rates_of(group: dict[str, Any]) -> tuple[float, ...]:
    lr = 0.0 if isinstance(group["lr"], Tensor) else float(group["lr"])
    return (lr, *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"]))


def _check_dtypes(params: list[Tensor]) -> None:
    for param in params:
        if param.dtype != torch.float32:
            raise ValueError(f"FusedAdamW: parameters must be torch.float32, not {param.dtype}")


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy of it that lies in memory as `param` does.

    ValueError if the parameter has gaps or overlaps.
    """
    if tensor.stride() == param.stride() and tensor.dtype == param.dtype:
        return tensor
    copy = torch.empty_like(param)
    if copy.stride() != param.stride():
        raise ValueError(
            "FusedAdamW: a parameter must fill its memory without gaps or overlaps, not "
            f"{list(param.shape)} strided {list(param.stride())}"
        )
    return copy.copy_(tensor)


def _uses_loops(param: Tensor) -> bool:
    """Whether a step is done in C++ (the kernels' tests say no: Triton's interpreter does it)."""
    return param.is_cpu


def _recording(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _refuse_while_recording(tensor: Tensor, why: str) -> None:
    if _recording(tensor):
        raise RuntimeError(
            f"FusedAdamW: this step cannot be recorded into a CUDA graph, because {why}: do a step "
            "before the capture, make lr a tensor on the device, and keep the gradients with "
            "zero_grad(set_to_none=False)"
        )
