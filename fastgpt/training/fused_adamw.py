"""Fused AdamW with gradient clipping over all parameters: Triton kernels on CUDA, C++ on a CPU."""

import sys
from importlib import import_module
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastgpt.utils.extension import _C

State = dict[str, Tensor]
Groups = list[list[Tensor]]  # the parameters of each group that have a gradient
Rows = tuple[list[Tensor], ...]  # parameters, gradients, first and second moments, step counts


class FusedAdamW(torch.optim.AdamW):
    """AdamW with built-in gradient clipping, fused over all parameters.

    Equivalent to `clip_grad_norm_` followed by `torch.optim.AdamW.step`. Implemented in
    `fastgpt.kernels.adamw` on CUDA, and in csrc/training/adamw.cpp on a CPU.

    `step` leaves `.grad` unchanged, and stores the gradient norm before clipping in `grad_norm`, a
    scalar tensor. If the norm is not finite, the step changes neither parameters nor moments nor
    step counts.

    `state_dict` and `load_state_dict` are compatible with `torch.optim.AdamW` in both directions.

    To capture steps in a CUDA graph, make `lr` a tensor on the device, run one step before the
    capture, and keep the gradients in the same memory with ``zero_grad(set_to_none=False)``.

    Args:
        params: Parameters or parameter groups, in fp32, all on one device.
        lr, betas, eps, weight_decay: As for `torch.optim.AdamW`.
        max_norm: Gradients are scaled down to this total norm if theirs is larger. None disables
            clipping.
    """

    grad_norm: Tensor | None = None
    _tensors: Any = None  # cached kernels.adamw.Tensors, with the addresses as the cache key
    _made_for: tuple[int, ...] = ()
    _hyper: Tensor | None = None  # cached fp64 [n, 5] on the device, with its values as the key
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
        self._step_supports_amp_scaling = False  # a GradScaler must unscale and skip by itself
        self._recorded: list[Any] = []  # tensors that captured CUDA graphs still read

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Raises ValueError unless all parameters are fp32."""
        _plain("add_param_group")(self, param_group)
        _check_dtypes(self.param_groups[-1]["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zero in place with ``set_to_none=False``."""
        _plain("zero_grad")(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the format of `torch.optim.AdamW`."""
        return _plain("state_dict")(self)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of `torch.optim.AdamW`."""
        _plain("load_state_dict")(self, state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, without synchronizing with the device."""
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        params = [p for group in groups for p in group]
        if not params:
            return
        states = [self._state(p) for p in params]
        grads = [_with_layout_of(p, p.grad) for p in params if p.grad is not None]
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        max_norm = float("inf") if self.max_norm is None else self.max_norm
        step = self._step_on_cpu if _uses_cpp(params[0]) else self._step_of_kernels
        self.grad_norm = step(groups, (params, grads, *moments), max_norm)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, to which PyTorch would not add `max_norm`."""
        return super().__getstate__() | {"max_norm": self.max_norm, "_recorded": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state, which may come from `torch.optim.AdamW` with any implementation options.

        Raises ValueError for `amsgrad`, `maximize` and `differentiable`.
        """
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "differentiable"):
                if group[option]:
                    raise ValueError(
                        f"FusedAdamW: a state made with {option}=True is not supported"
                    )
            group.update(fused=True, foreach=None, capturable=False)

    def _step_on_cpu(self, groups: Groups, rows: Rows, max_norm: float) -> Tensor:
        rates = [
            (float(group["lr"]), *_rates_of(group)[1:])
            for group, params in zip(self.param_groups, groups, strict=True)
            for _ in params
        ]
        if torch._C._len_torch_dispatch_stack():  # for example fake tensors, which have no memory
            raise RuntimeError("FusedAdamW cannot be traced on a CPU: use torch.optim.AdamW there")
        addresses = [
            (tensors[0].numel(), *(tensor.data_ptr() for tensor in tensors))
            for tensors in zip(*rows, strict=True)
        ]
        return torch.tensor(_C.adamw(addresses, rates, max_norm, torch.get_num_threads()))

    def _step_of_kernels(self, groups: Groups, rows: Rows, max_norm: float) -> Tensor:
        adamw = import_module("fastgpt.kernels.adamw")  # imported lazily: Triton is optional
        tensors = self._find(adamw, rows)
        hyper = self._rates(adamw, groups, rows[0][0])
        if _recording(rows[0][0]):
            self._recorded += [tensors, hyper]  # keep alive what the captured graph reads
        norm: Tensor = adamw.adamw(tensors, hyper, max_norm)
        return norm

    def _state(self, param: Tensor) -> State:
        """Return a parameter's step count and moments; create them on first use.

        Loaded states are converted to the device, dtype and strides that the kernels require.
        """
        state: State = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        step = state["step"]
        if step.device != param.device or step.dtype != torch.float32:  # AdamW may have it on a CPU
            state["step"] = step.to(param.device, torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):  # loading may have changed the strides
            state[name] = _with_layout_of(param, state[name])
        return state

    def _find(self, adamw: Any, rows: Rows) -> Any:
        """Return the device tables of tensor addresses and sizes, rebuilt only if one has moved."""
        params = rows[0]
        made_for = tuple(tensor.data_ptr() for row in rows for tensor in row)
        if self._tensors is None or made_for != self._made_for:
            _check_not_capturing(params[0], "one of its tensors has moved since the last step")
            # The first n addresses are the parameters': if these are unchanged, the sizes are too,
            # and only the addresses are copied to the device.
            n, n_before = len(params), len(self._made_for) // len(rows)
            same = n == n_before and made_for[:n] == self._made_for[:n]
            self._tensors = adamw.make_tensor_tables(*rows, before=self._tensors if same else None)
            self._made_for = made_for
        return self._tensors

    def _rates(self, adamw: Any, groups: Groups, param: Tensor) -> Tensor:
        """Return the hyperparameters of each parameter on the device, fp64 `[n, 5]`.

        They are copied only if one has changed. A learning rate that is a tensor is copied into the
        table at each step, without synchronization and as part of a captured CUDA graph.
        """
        values = tuple(_rates_of(group) for group in self.param_groups)
        values = tuple(v for v, group in zip(values, groups, strict=True) for _ in group)
        if self._hyper is None or values != self._hyper_values:
            _check_not_capturing(param, "a hyperparameter that is not a tensor has changed")
            self._hyper = adamw.to_device(torch.tensor(values, dtype=torch.float64), param.device)
            self._hyper_values = values
        done = 0
        for group, params in zip(self.param_groups, groups, strict=True):
            if isinstance(group["lr"], Tensor):
                self._hyper[done : done + len(params), 0] = group["lr"]
            done += len(params)
        return self._hyper


def _plain(name: str) -> Any:
    """Return a method of `torch.optim.Optimizer` without its "disable torch.compile" wrapper.

    The wrapper would import the compiler only to disable it, which takes two seconds and 150 MB of
    memory. If the compiler is already imported, the wrapped method is returned.
    """
    method = getattr(torch.optim.Optimizer, name)
    return method if "torch._dynamo" in sys.modules else unwrap(method)


def _rates_of(group: dict[str, Any]) -> tuple[float, ...]:
    """Return lr, betas, eps and weight decay of a group; 0 for a learning rate in a tensor."""
    lr = 0.0 if isinstance(group["lr"], Tensor) else float(group["lr"])
    return (lr, *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"]))


def _check_dtypes(params: list[Tensor]) -> None:
    for param in params:
        if param.dtype != torch.float32:
            raise ValueError(f"FusedAdamW: parameters must be torch.float32, not {param.dtype}")


def _with_layout_of(param: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` if it has the strides and dtype of `param`, else a copy that has.

    Raises:
        ValueError: If `param` is not dense and non-overlapping in memory.
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


def _uses_cpp(param: Tensor) -> bool:
    """Whether to use the C++ implementation (tests override it to run the Triton interpreter)."""
    return param.is_cpu


def _recording(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_not_capturing(tensor: Tensor, why: str) -> None:
    if _recording(tensor):
        raise RuntimeError(
            f"FusedAdamW: this step cannot be captured in a CUDA graph, because {why}: run a step "
            "before the capture, make lr a tensor on the device, and keep the gradients with "
            "zero_grad(set_to_none=False)"
        )
