"""Lion, D-Lion and AdamW as torch optimizers.

The arithmetic is in `lion.py`, `dlion.py` and `adamw.py`.  This module handles parameter groups, state and hyper-parameters.  A
step reads nothing back from the device, so it never waits.  Any list of parameters works, in any training loop:

    optimizer = DLion(model.parameters())                        # fp32 parameters
    optimizer = Lion([bf16_with_masters(model.parameters())])    # bf16 parameters that are updated as exact fp32 masters

fastsd gives each optimizer a single parameter, the arena of a component (`fastsd/train/trainable.py`).  Read next: `dlion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsd_kernels import REFERENCE, Ops, fastest
from fastsd_kernels.arena import split_master
from fastsd_kernels.ops import StepOptions, StepSettings, Tensors

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Group = dict[str, Any]
Select = Callable[[Tensor], Tensor]
Join = Callable[[Tensor], Tensor]

SMALL = 1 << 22  # elements: 16 MB per fp32 tensor
# The state that all parameters share is an entry of `state`, so that torch saves, loads and copies it.
_SHARED = "shared"


class FastOptimizer(Optimizer):
    """Base class of the three optimizers. It checks groups, creates state when needed, and loads state bit by bit.

    `ops` is the implementation.  The default is the fastest one for the device, except on a CPU with fewer than SMALL
    elements in total: there the reference is as fast, and its sums and roots equal the original optimizers' to the last bit.

    A group may hold two lists parallel to its "params".  "masters_lo" has int16 halves, which make bf16 parameters exact fp32
    masters.  "emas" has fp32 averages, K of each parameter along a leading dimension, which are updated with "ema_decay"
    (see `StepOptions` in `fastsd_kernels/ops.py`).  lr may be a 0-dim fp64 device tensor.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]  # fp32 state tensors of a parameter's shape
    frozen: Tensor | None = None  # 0-dim bool on the device; while it is true, `step_size` is constant

    def __init__(self, params: Params, defaults: dict[str, Any], ops: Ops | None) -> None:
        super().__init__(params, defaults)
        parameters = [p for group in self.param_groups for p in group["params"]]
        small = parameters[0].is_cpu and sum(p.numel() for p in parameters) < SMALL
        self.ops = ops or (REFERENCE if small else fastest(parameters[0].device))
        self._overflow = torch.zeros((), dtype=torch.bool, device=parameters[0].device)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters like `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a hyper-parameter out of range, a parameter that is not fp32, or a second device.
        """
        super().add_param_group(param_group)
        try:
            self._validate(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _validate(self, group: Group) -> None:
        if not isinstance(group["lr"], Tensor):  # do not check a tensor: reading its value would wait for the device
            _require(self.name, "lr", group["lr"], 0 <= group["lr"] < math.inf, "a finite number, 0 or more")
        betas = group["betas"]
        _require(self.name, "betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        weight_decay = group["weight_decay"]
        _require(self.name, "weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a finite number, 0 or more")
        device = self.param_groups[0]["params"][0].device if self.param_groups[0]["params"] else None
        dtype = torch.bfloat16 if group.get("masters_lo") else torch.float32
        for p in group["params"]:
            requirement = "fp32 parameters, or bf16 parameters with lows"
            _require(self.name, "parameter dtype", p.dtype, p.dtype == dtype, requirement)
            _require(self.name, "parameter device", str(p.device), p.device == device, f"parameters on {device} only")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, found_inf: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient. An element whose update would not be finite keeps its weight and state.

        Args:
            closure: called first, with gradients enabled. Its result is returned.
            found_inf: 0-dim bool or float on the parameters' device. If nonzero, no byte of parameters or state changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            indices = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            grads = [_grad_in_layout(group["params"][i]) for i in indices]
            self._update(group, indices, grads, None, {"found_inf": found_inf})
        self.finish(found_inf=found_inf)
        return loss

    @torch.no_grad()
    def update(
        self, *gradients: Tensor, select: Select | None = None, found_inf: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Update the parameters of the optimizer's only group: an arena, some of its elements, or pieces of it.

        Args:
            gradients: one for each parameter, fp32 or bf16, in its layout or that of the selected elements.
            select: maps any tensor in the arena's layout to the elements to update; None = the whole arena.
            scale: factor of the gradient, 0-dim fp32 on the device.

        Every element must be updated once before `finish` ends the step.
        """
        (group,) = self.param_groups
        self._update(group, [*range(len(gradients))], gradients, select, {"found_inf": found_inf, "scale": scale})

    @torch.no_grad()
    def finish(self, *, found_inf: Tensor | None = None) -> Tensor:
        """End a step that consists of calls of `update`.

        Returns:
            0-dim bool on the device, true if elements kept their weights and state because an update was not finite.
        """
        self._finish(found_inf)
        overflow = self._overflow.clone()
        self._overflow.zero_()
        return overflow

    def partial_sums(self) -> Tensor:
        """Return what this process's updates have added up, fp64 (S,), for `merge_sums` of all that share the step."""
        return self._overflow.double().view(1)

    def merge_sums(self, sums_RS: Tensor, join: Join) -> None:
        """Replace the partial sums by those of R processes. `join` puts (R, K) sums of their parameters into one order."""
        self._overflow.copy_(sums_RS[:, 0].any())

    def discard_updates(self) -> None:
        """Drop intermediate results of an unfinished step. Parameters that it has updated are not restored."""
        self._overflow.zero_()

    def _update(self, group: Group, indices: list[int], grads: Tensors, select: Select | None, options: StepOptions) -> None:
        """Launch the elementwise pass for the parameters `indices` of a group, or for the elements that `select` returns."""
        raise NotImplementedError

    def _finish(self, found_inf: Tensor | None) -> None:
        """Complete the step after all parameters are updated."""

    def allocate_state(self) -> None:
        """Create the state of all parameters, which otherwise happens in the first step."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state of one parameter, initialised to zeros on first use."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state.update({slot: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for slot in self.slots})
        return state

    def _op_arguments(
        self, group: Group, indices: list[int], grads: Tensors, select: Select | None, options: StepOptions
    ) -> tuple[list[Tensors], StepSettings]:
        """Return the arguments of an op: lists of parameters, gradients and the state of each slot; and its settings."""
        select = select or (lambda t: t)
        states = [self._state_of(group["params"][i]) for i in indices]
        lists: list[Tensors] = [[select(group["params"][i]) for i in indices], grads]
        lists += [[select(state[slot]) for state in states] for slot in self.slots]
        settings = StepSettings(lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"], **options)
        settings["overflow"] = self._overflow
        if group.get("masters_lo"):
            settings["masters_lo"] = [select(group["masters_lo"][i]) for i in indices]
        if group.get("emas"):
            settings["emas"] = [select(group["emas"][i]) for i in indices]
            settings["ema_decay"] = group["ema_decay"]
        return lists, settings

    @property
    def step_size(self) -> Tensor | None:
        """The estimate d of an optimizer that tunes its lr, 0-dim fp64 on the device. None for the others."""
        return None

    def extra_state(self) -> dict[str, Tensor]:
        """Return the state besides the slots by name, as `optimizer_state.py` stores it."""
        return {}

    def load_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` returned."""
        for key, target in self.extra_state().items():
            target.copy_(tensors[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()` bit by bit. The tensors are copied, so the source may go on training.

        Raises:
            ValueError: the groups or their sizes differ from those of this optimizer.
        """
        super().load_state_dict(state_dict)
        device = self.param_groups[0]["params"][0].device
        for owner, state in list(self.state.items()):
            self.state[owner] = {key: value.to(device, copy=True) for key, value in state.items()}


class Lion(FastOptimizer):
    """Lion, bit-equal to lion-pytorch 0.2.5 on a CPU.

    Args:
        params: fp32 parameters or groups of them, on one device.
        lr: step size in units of the parameter.
        betas: (decay for the update, decay of the momentum).
        weight_decay: a step multiplies the parameters by 1 - lr * weight_decay.
        decoupled_weight_decay: divide weight_decay by the lr given here, so that only the schedule of lr scales the decay.

    Raises:
        ValueError: a hyper-parameter out of range.

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.
    """

    name = "Lion"
    slots = ("exp_avg",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        ops: Ops | None = None,
    ) -> None:
        if decoupled_weight_decay:
            _require(self.name, "lr", lr, lr > 0, "a number above 0, because decoupled_weight_decay divides by it")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, defaults, ops)

    def _update(self, group: Group, indices: list[int], grads: Tensors, select: Select | None, options: StepOptions) -> None:
        (params, grads, exp_avgs), settings = self._op_arguments(group, indices, grads, select, options)
        if group["decoupled_weight_decay"]:
            settings["weight_decay"] /= self.defaults["lr"]
        self.ops.lion(params, grads, exp_avgs, **settings)


class DLion(FastOptimizer):
    """D-Adaptation Lion, `DAdaptLion` of dadaptation 3.2. All its parameters share one d: use one per trained component.

    Args:
        params: fp32 parameters or groups of them, on one device. Groups may differ in weight_decay only.
        lr: factor on d; leave it at 1 and let a schedule change it.
        betas: (decay for the update, decay of momentum and s).
        weight_decay: a step multiplies the parameters by 1 - d * lr * weight_decay.
        d0: first estimate of d, in units of the parameter.
        growth_rate: largest factor by which d grows per step; None = no limit, the upstream default.
        d_max: upper limit of d; None = no limit.

    Raises:
        ValueError: a hyper-parameter is out of range or groups differ in betas; in `step`: groups differ in lr.

    Source: Defazio and Mishchenko 2023, "Learning-rate-free learning by D-Adaptation".
    """

    name = "DLion"
    slots = ("exp_avg", "s")

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        growth_rate: float | None = None,
        d_max: float | None = None,
        ops: Ops | None = None,
    ) -> None:
        _require(self.name, "d0", d0, 0 < d0 < math.inf, "a finite number above 0")
        _require(self.name, "growth_rate", growth_rate, growth_rate is None or growth_rate > 1, "a number above 1, or None")
        _require(self.name, "d_max", d_max, d_max is None or d_max >= d0, f"d0 ({d0}) or more, or None")
        self.growth_rate, self.d_max = growth_rate, d_max
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, ops)
        self._sums: list[tuple[Tensor, Tensor]] = []
        device = self.param_groups[0]["params"][0].device
        self.state[_SHARED] = {  # type: ignore[index]
            "d": torch.full((), d0, dtype=torch.float64, device=device),
            "numerator_weighted": torch.zeros((), dtype=torch.float64, device=device),
        }

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        betas = tuple(self.param_groups[0]["betas"])
        _require(self.name, "betas", group["betas"], tuple(group["betas"]) == betas, f"{betas} in every group")

    @property
    def shared(self) -> dict[str, Tensor]:
        """The tensors "d" and "numerator_weighted", 0-dim fp64 on the device, which can be logged without waiting."""
        return self.state[_SHARED]  # type: ignore[index, no-any-return]

    @property
    def step_size(self) -> Tensor:
        return self.shared["d"]

    def extra_state(self) -> dict[str, Tensor]:
        return self.shared

    def d(self) -> float:
        """Return the estimate that the next step uses. Waits for the device."""
        return float(self.step_size)

    def _update(self, group: Group, indices: list[int], grads: Tensors, select: Select | None, options: StepOptions) -> None:
        lr = self.param_groups[0]["lr"]
        if group["lr"] is not lr:  # comparing two tensors would wait for the device
            same = not isinstance(lr, Tensor) and group["lr"] == lr
            _require(self.name, "lr", group["lr"], same, f"{lr} in every group, or use one optimizer per component")
        (params, grads, exp_avgs, s), settings = self._op_arguments(group, indices, grads, select, options)
        self._sums.append(self.ops.dlion(params, grads, exp_avgs, s, self.step_size, **settings))

    def partial_sums(self) -> Tensor:
        return torch.cat([super().partial_sums(), *(torch.cat(sums).double() for sums in zip(*self._sums, strict=True))])

    def merge_sums(self, sums_RS: Tensor, join: Join) -> None:
        super().merge_sums(sums_RS, join)
        dots_RK, l1_RK = sums_RS[:, 1:].chunk(2, dim=1)
        dtype = self._sums[0][0].dtype  # from which they were converted without a loss
        self._sums = [(join(dots_RK).to(dtype), join(l1_RK).to(dtype))]

    def discard_updates(self) -> None:
        super().discard_updates()
        self._sums = []

    def _finish(self, found_inf: Tensor | None) -> None:
        dots_K, l1_K = (torch.cat(sums) for sums in zip(*self._sums, strict=True))
        self._sums = []

        d = self.step_size
        limited = self.growth_rate is not None or self.frozen is not None
        previous_d = d.clone() if limited else d
        lr, beta2 = self.param_groups[0]["lr"], self.param_groups[0]["betas"][1]
        # If elements kept their s, the sums are not those of the whole step.
        unsound = self._overflow if found_inf is None else self._overflow | (found_inf != 0)
        self.ops.dlion_estimate(d, self.shared["numerator_weighted"], dots_K, l1_K, lr=lr, beta2=beta2, found_inf=unsound)
        if self.growth_rate is not None:
            d.copy_(torch.minimum(d, previous_d * self.growth_rate))
        if self.d_max is not None:
            d.clamp_(max=self.d_max)
        if self.frozen is not None:
            d.copy_(torch.where(self.frozen, previous_d, d))


class AdamW(FastOptimizer):
    """AdamW, bit-equal to the plain torch.optim.AdamW on a CPU.

    Args:
        params: fp32 parameters or groups of them, on one device.
        lr: step size in units of the parameter.
        betas: decay of (first, second) moment.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: a step multiplies the parameters by 1 - lr * weight_decay.

    Raises:
        ValueError: a hyper-parameter out of range.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2.
    """

    name = "AdamW"
    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ops: Ops | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, ops)
        self._copied_steps = False

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        _require(self.name, "eps", group["eps"], 0 <= group["eps"] < math.inf, "a finite number, 0 or more")

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = super()._state_of(p)
        if "step" not in state:
            state["step"] = torch.zeros((), device=p.device)
        return state

    def _steps(self) -> list[Tensor]:
        return [self._state_of(p)["step"] for group in self.param_groups for p in group["params"]]

    def extra_state(self) -> dict[str, Tensor]:
        return {"step": torch.stack(self._steps())}

    def load_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        for step, loaded in zip(self._steps(), tensors["step"], strict=True):
            step.copy_(loaded)

    def _update(self, group: Group, indices: list[int], grads: Tensors, select: Select | None, options: StepOptions) -> None:
        (params, grads, exp_avgs, exp_avg_sqs), settings = self._op_arguments(group, indices, grads, select, options)
        steps = [self._state_of(group["params"][i])["step"] for i in indices]
        if select:  # every call increments copies of the step counts, and `_finish` increments the original once
            self._copied_steps = True
            steps = [step.clone() for step in steps]
        self.ops.adamw(params, grads, exp_avgs, exp_avg_sqs, steps, eps=group["eps"], **settings)

    def _finish(self, found_inf: Tensor | None) -> None:
        if self._copied_steps:
            self._copied_steps = False
            step = self._state_of(self.param_groups[0]["params"][0])["step"]
            step += 1 if found_inf is None else found_inf == 0


@torch.no_grad()
def bf16_with_masters(params: Iterable[Tensor]) -> Group:
    """Convert fp32 parameters to bf16 in place. Return a parameter group in which they are exact fp32 masters.

    A parameter becomes the upper half of its fp32 number, and the group keeps the lower half (`arena.py`), so a step rounds
    nothing. `arena.join_master(p, low)` returns the exact numbers.
    """
    group: Group = {"params": list(params), "masters_lo": []}
    for p in group["params"]:
        p.data, master_lo = split_master(p.data)
        group["masters_lo"].append(master_lo)
    return group


def _grad_in_layout(p: Tensor) -> Tensor:
    """Return the gradient in the parameter's memory order, which autograd ensures, but not a user who sets `p.grad`."""
    assert p.grad is not None
    return p.grad if p.grad.stride() == p.stride() else torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)


def _require(owner: str, field: str, value: object, holds: bool, requirement: str) -> None:
    if not holds:
        raise ValueError(f"{owner}: {field} is {value}; give {requirement}")
