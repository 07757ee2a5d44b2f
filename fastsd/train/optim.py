"""Lion, D-Lion and AdamW as torch optimizers, and their state as named tensors for a checkpoint.

The arithmetic is `fastsd_kernels.lion`, `.dlion`, `.adamw`; here are parameter groups, state and hyper-parameters. A
step reads nothing back from the device, so it never waits. Read next: `fastsd_kernels/dlion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsd_kernels.adamw import adamw_reference
from fastsd_kernels.dlion import dlion_estimate_reference, dlion_reference
from fastsd_kernels.lion import lion_reference

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

# State of the whole optimizer lies in `state` beside the parameters' own: torch saves, loads and copies such entries.
_SHARED = "shared"


class FastOptimizer(Optimizer):
    """What the three share: checked groups, lazy state, `step`, and loading that keeps bits and devices."""

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]  # fp32 state tensors of a parameter's shape

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a hyper-parameter out of range, a parameter that is not fp32, or a second device.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        _require(self.name, "lr", group["lr"], 0 <= group["lr"] < math.inf, "a finite number, 0 or more")
        betas = group["betas"]
        _require(self.name, "betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        wd = group["weight_decay"]
        _require(self.name, "weight_decay", wd, 0 <= wd < math.inf, "a finite number, 0 or more")
        device = self.param_groups[0]["params"][0].device if self.param_groups[0]["params"] else None
        for p in group["params"]:
            _require(self.name, "parameter dtype", p.dtype, p.dtype == torch.float32, "fp32 parameters")
            _require(self.name, "parameter device", str(p.device), p.device == device, f"parameters on {device} only")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, skip: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluated first with gradients on; its value is returned.
            skip: 0-dim bool or float on the parameters' device. Nonzero: no byte of parameters or state changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(skip)
        return loss

    def _update(self, skip: Tensor | None) -> None:
        raise NotImplementedError

    def _own(self, p: Tensor) -> dict[str, Tensor]:
        """The state of one parameter, made of zeros at first use."""
        own = self.state[p]
        if not own:
            own.update({slot: torch.zeros_like(p, requires_grad=False) for slot in self.slots})
        return own

    def _lists(self, group: dict[str, Any], *keys: str) -> tuple[list[Tensor], ...]:
        """Parameters with a gradient, their gradients, and their state by key: parallel lists."""
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._own(p) for p in params]
        return params, [p.grad for p in params], *([own[key] for own in states] for key in keys)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict()` bit by bit; the tensors are copied, so the source may go on.

        Raises:
            ValueError: groups or their sizes differ from this optimizer's.
        """
        super().load_state_dict(state_dict)
        device = self.param_groups[0]["params"][0].device
        for owner, own in list(self.state.items()):
            self.state[owner] = {key: value.to(device, copy=True) for key, value in own.items()}


class Lion(FastOptimizer):
    """Lion, bit-equal to lion-pytorch 0.2.5 on a CPU.

    Args:
        params: fp32 parameters or groups of them, on one device.
        lr: step size in units of the parameter.
        betas: (of the update, of the momentum).
        weight_decay: multiplies lr.
        decoupled_weight_decay: divide weight_decay by the lr given here, so that only its schedule scales the decay.

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
        decoupled_weight_decay: bool = False,
    ) -> None:
        if decoupled_weight_decay:
            _require(self.name, "lr", lr, lr > 0, "more than 0, for decoupled_weight_decay divides by it")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def _update(self, skip: Tensor | None) -> None:
        for group in self.param_groups:
            wd = group["weight_decay"]
            if group["decoupled_weight_decay"]:
                wd /= self.defaults["lr"]
            lists = self._lists(group, *self.slots)
            lion_reference(*lists, lr=group["lr"], betas=group["betas"], weight_decay=wd, skip=skip)


class DLion(FastOptimizer):
    """D-Adaptation Lion: `DAdaptLion` of dadaptation 3.2. One d for all parameters given: one optimizer a trained part.

    Args:
        params: fp32 parameters or groups of them, on one device. Groups may differ in weight_decay only.
        lr: factor on d; leave it at 1 and let a schedule move it.
        betas: (of the update, of momentum and s).
        weight_decay: multiplies d lr.
        d0: first estimate of d, in units of the parameter.

    Raises:
        ValueError: a hyper-parameter out of range, or groups that differ in betas; in `step`, groups that differ in lr.

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
    ) -> None:
        _require(self.name, "d0", d0, 0 < d0 < math.inf, "a finite number above 0")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        self.state[_SHARED] = {  # type: ignore[index]
            "d": torch.full((), d0, dtype=torch.float64, device=device),
            "numerator_weighted": torch.zeros((), dtype=torch.float64, device=device),
        }

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        first = tuple(self.param_groups[0]["betas"])
        _require(self.name, "betas", group["betas"], tuple(group["betas"]) == first, f"{first} in every group")

    @property
    def shared(self) -> dict[str, Tensor]:
        """ "d" and "numerator_weighted", 0-dim fp64 on the device: for a log that must not wait."""
        return self.state[_SHARED]  # type: ignore[index]

    def d(self) -> float:
        """The estimate that the next step uses. Waits for the device."""
        return float(self.shared["d"])

    def _update(self, skip: Tensor | None) -> None:
        lr, betas = self.param_groups[0]["lr"], self.param_groups[0]["betas"]
        d, numerator_weighted = self.shared["d"], self.shared["numerator_weighted"]
        for group in self.param_groups[1:]:
            same = group["lr"] is lr or group["lr"] == lr
            _require(self.name, "lr", group["lr"], same, f"{lr} in every group, or one optimizer a part")
        sums = []
        for group in self.param_groups:
            params, grads, exp_avgs, s = self._lists(group, *self.slots)
            wd = group["weight_decay"]
            sums.append(dlion_reference(params, grads, exp_avgs, s, d, lr=lr, betas=betas, weight_decay=wd, skip=skip))
        dots_K, l1_K = (torch.cat(part) for part in zip(*sums, strict=True))
        dlion_estimate_reference(d, numerator_weighted, dots_K, l1_K, lr=lr, beta2=betas[1], skip=skip)


class AdamW(FastOptimizer):
    """AdamW, bit-equal to torch.optim.AdamW (its plain form) on a CPU.

    Args:
        params: fp32 parameters or groups of them, on one device.
        lr: step size in units of the parameter.
        betas: decay of (first, second moment).
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: multiplies lr.

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
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        _require(self.name, "eps", group["eps"], 0 <= group["eps"] < math.inf, "a finite number, 0 or more")

    def _own(self, p: Tensor) -> dict[str, Tensor]:
        own = super()._own(p)
        if "step" not in own:
            own["step"] = torch.zeros((), device=p.device)
        return own

    def _update(self, skip: Tensor | None) -> None:
        for group in self.param_groups:
            adamw_reference(
                *self._lists(group, *self.slots, "step"),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                skip=skip,
            )


def flat_state(optimizer: FastOptimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state as named tensors, for safetensors.

    Args:
        names: the parameters' names, in the order of `optimizer.param_groups`.

    Returns:
        "<slot>/<name>" fp32 of the parameter's shape for each slot of the optimizer; for D-Lion "d" and
        "numerator_weighted", fp64 0-dim; for AdamW "step", fp32, one number a parameter. Zeros for a parameter that
        never had a gradient. Contiguous state is given as it is, not copied: write or clone it before the next step.

    Raises:
        ValueError: not one distinct name a parameter.
    """
    named = _named(optimizer, names)
    owns = {name: optimizer._own(p) for name, p in named.items()}
    tensors = {f"{slot}/{name}": own[slot] for slot in optimizer.slots for name, own in owns.items()}
    if isinstance(optimizer, DLion):
        tensors |= optimizer.shared
    if isinstance(optimizer, AdamW):
        tensors["step"] = torch.stack([own["step"] for own in owns.values()])
    return tensors


@torch.no_grad()
def load_flat_state(optimizer: FastOptimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Set the state from `flat_state`'s tensors, on any device, bit by bit. Nothing is set if anything is wrong.

    Raises:
        ValueError: an entry missing, unexpected, or of another shape or dtype; or not one distinct name a parameter.
    """
    expected = flat_state(optimizer, names)
    advice = f"the state is of other parameters or not of {optimizer.name}; start its optimizer anew"
    for what, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unexpected", tensors.keys() - expected.keys()),
    ):
        if keys:
            raise ValueError(f"optimizer state {what} {min(keys)!r} ({len(keys)} such entries): {advice}")
    for key, want in expected.items():
        got = tensors[key]
        if got.shape != want.shape or got.dtype != want.dtype:
            found, needed = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (got, want))
            raise ValueError(f"optimizer state {key!r} is {found}, needs {needed}: {advice}")
    for i, (name, p) in enumerate(_named(optimizer, names).items()):
        own = optimizer._own(p)
        for slot in optimizer.slots:
            own[slot].copy_(tensors[f"{slot}/{name}"])
        if isinstance(optimizer, AdamW):
            own["step"].copy_(tensors["step"][i])
    if isinstance(optimizer, DLion):
        for key, value in optimizer.shared.items():
            value.copy_(tensors[key])


def _named(optimizer: FastOptimizer, names: Sequence[str]) -> dict[str, Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(set(names)) != len(params) or len(names) != len(params):
        raise ValueError(
            f"optimizer state: {len(set(names))} distinct names for {len(params)} parameters; give one each, in order"
        )
    return dict(zip(names, params, strict=True))


def _require(owner: str, field: str, found: object, holds: bool, want: str) -> None:
    if not holds:
        raise ValueError(f"{owner}: {field} is {found}; give {want}")
