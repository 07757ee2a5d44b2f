"""Lion, D-Lion and AdamW as torch optimizers, and their state as named tensors for a checkpoint.

The arithmetic is `fastsd_kernels.lion`, `.dlion`, `.adamw`; here are parameter groups, state and hyper-parameters. A
step reads nothing back from the device, so it never waits. Any list of parameters will do; training gives each optimizer
one, the arena of a part (`trainable.py`). Read next: `fastsd_kernels/dlion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsd_kernels import REFERENCE, Ops, fastest

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Cut = Callable[[Tensor], Tensor]
Views = Callable[[Tensor], list[Tensor]]

SMALL = 1 << 22  # elements: 16 MB of each tensor
# State of the whole optimizer lies in `state` beside the parameters' own: torch saves, loads and copies such entries.
_SHARED = "shared"


class FastOptimizer(Optimizer):
    """What the three share: checked groups, lazy state, `step`, and loading that keeps bits and devices.

    `ops` is the implementation. By default it is the device's fastest, but on a CPU, for fewer than SMALL elements in all, the
    reference: as fast there, and its sums and roots have the peers' last bits.

    A group may hold, parallel to its "params": "lows", int16 halves that make bf16 parameters exact fp32 masters, and
    "emas", fp32 averages moved with "ema_decay" (see `fastsd_kernels/arena.py`). lr may be a 0-dim fp64 tensor on the device.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]  # fp32 state tensors of a parameter's shape

    def __init__(self, params: Params, defaults: dict[str, Any], ops: Ops | None) -> None:
        super().__init__(params, defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        small = everything[0].is_cpu and sum(p.numel() for p in everything) < SMALL
        self.ops = ops or (REFERENCE if small else fastest(everything[0].device))

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
        if not isinstance(group["lr"], Tensor):  # a tensor's value is not read: that would wait
            _require(self.name, "lr", group["lr"], 0 <= group["lr"] < math.inf, "a finite number, 0 or more")
        betas = group["betas"]
        _require(self.name, "betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        wd = group["weight_decay"]
        _require(self.name, "weight_decay", wd, 0 <= wd < math.inf, "a finite number, 0 or more")
        device = self.param_groups[0]["params"][0].device if self.param_groups[0]["params"] else None
        dtype = torch.bfloat16 if group.get("lows") else torch.float32
        for p in group["params"]:
            want = "fp32 parameters, or bf16 ones with their low halves"
            _require(self.name, "parameter dtype", p.dtype, p.dtype == dtype, want)
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
        for group in self.param_groups:
            rows = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            self._update(group, rows, [_laid_out(group["params"][i]) for i in rows], None, skip=skip)
        self._finish(skip)
        return loss

    @torch.no_grad()
    def update(
        self, gradient: Tensor, *, cut: Cut | None = None, skip: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Update the only parameter there is, an arena; or the part of it that `cut` takes from any tensor of its layout.

        Args:
            gradient: fp32 or bf16, of the arena's or the part's layout.
            scale: 0-dim fp32 on the device, multiplies the gradient.

        Every element must be updated once before `finish` ends the step.
        """
        (group,) = self.param_groups
        self._update(group, [0], [gradient], cut, skip=skip, scale=scale)

    @torch.no_grad()
    def finish(self, *, skip: Tensor | None = None) -> None:
        """End a step that was made of `update`s."""
        self._finish(skip)

    def forget(self) -> None:
        """Drop what the updates of a step that will not be finished have left; no parameter is put back."""

    def _update(
        self, group: dict[str, Any], rows: list[int], grads: list[Tensor], cut: Cut | None, **options: Tensor | None
    ) -> None:
        """Launch the elementwise pass for the parameters at `rows` of a group, or for the part of them that `cut` takes."""
        raise NotImplementedError

    def _finish(self, skip: Tensor | None) -> None:
        """What is left to do once all parameters are updated."""

    def _own(self, p: Tensor) -> dict[str, Tensor]:
        """The state of one parameter, made of zeros at first use."""
        own = self.state[p]
        if not own:
            own.update({slot: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for slot in self.slots})
        return own

    def _lists(
        self, group: dict[str, Any], rows: list[int], grads: list[Tensor], cut: Cut | None
    ) -> tuple[list[list[Tensor]], dict[str, Any]]:
        """(parameters, gradients and each slot's state as parallel lists; keyword arguments of every op)."""
        cut = cut or (lambda t: t)
        owns = [self._own(group["params"][i]) for i in rows]
        lists = [[cut(group["params"][i]) for i in rows], grads]
        lists += [[cut(own[slot]) for own in owns] for slot in self.slots]
        options: dict[str, Any] = {"lr": group["lr"], "betas": group["betas"], "weight_decay": group["weight_decay"]}
        for key in ("lows", "emas"):
            if group.get(key):
                options[key] = [cut(group[key][i]) for i in rows]
        if group.get("emas"):
            options["ema_decay"] = group["ema_decay"]
        return lists, options

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
        ops: Ops | None = None,
    ) -> None:
        if decoupled_weight_decay:
            _require(self.name, "lr", lr, lr > 0, "more than 0, for decoupled_weight_decay divides by it")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, ops)

    def _update(
        self, group: dict[str, Any], rows: list[int], grads: list[Tensor], cut: Cut | None, **options: Tensor | None
    ) -> None:
        lists, settings = self._lists(group, rows, grads, cut)
        if group["decoupled_weight_decay"]:
            settings["weight_decay"] /= self.defaults["lr"]
        self.ops.lion(*lists, **settings, **options)


class DLion(FastOptimizer):
    """D-Adaptation Lion: `DAdaptLion` of dadaptation 3.2. One d for all parameters given: one optimizer a trained part.

    Args:
        params: fp32 parameters or groups of them, on one device. Groups may differ in weight_decay only.
        lr: factor on d; leave it at 1 and let a schedule move it.
        betas: (of the update, of momentum and s).
        weight_decay: multiplies d lr.
        d0: first estimate of d, in units of the parameter.
        growth_rate: d grows by no more than this factor a step; None = without limit, as upstream's default.
        d_max: d stays at or below this; None = without limit.

    Attributes:
        frozen: 0-dim bool on the device, or None; true: d stays as it is.

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
        growth_rate: float | None = None,
        d_max: float | None = None,
        ops: Ops | None = None,
    ) -> None:
        _require(self.name, "d0", d0, 0 < d0 < math.inf, "a finite number above 0")
        _require(self.name, "growth_rate", growth_rate, growth_rate is None or growth_rate > 1, "above 1, or None")
        _require(self.name, "d_max", d_max, d_max is None or d_max >= d0, f"d0 ({d0}) or more, or None")
        self.growth_rate, self.d_max = growth_rate, d_max
        self.frozen: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, ops)
        self._sums: list[tuple[Tensor, Tensor]] = []
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

    def _update(
        self, group: dict[str, Any], rows: list[int], grads: list[Tensor], cut: Cut | None, **options: Tensor | None
    ) -> None:
        lr = self.param_groups[0]["lr"]
        if group["lr"] is not lr:  # two tensors are not compared: that would wait
            same = not isinstance(lr, Tensor) and group["lr"] == lr
            _require(self.name, "lr", group["lr"], same, f"{lr} in every group, or one optimizer a part")
        lists, settings = self._lists(group, rows, grads, cut)
        self._sums.append(self.ops.dlion(*lists, self.shared["d"], **settings, **options))

    def forget(self) -> None:
        self._sums = []

    def _finish(self, skip: Tensor | None) -> None:
        dots_K, l1_K = (torch.cat(part) for part in zip(*self._sums, strict=True))
        self._sums = []
        first, d = self.param_groups[0], self.shared["d"]
        guarded = self.growth_rate is not None or self.d_max is not None or self.frozen is not None
        before = d.clone() if guarded else d
        self.ops.dlion_estimate(*self.shared.values(), dots_K, l1_K, lr=first["lr"], beta2=first["betas"][1], skip=skip)
        if self.growth_rate is not None:
            d.copy_(torch.minimum(d, before * self.growth_rate))
        if self.d_max is not None:
            d.clamp_(max=self.d_max)
        if self.frozen is not None:
            d.copy_(torch.where(self.frozen, before, d))


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
        ops: Ops | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, ops)
        self._cut = False

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        _require(self.name, "eps", group["eps"], 0 <= group["eps"] < math.inf, "a finite number, 0 or more")

    def _own(self, p: Tensor) -> dict[str, Tensor]:
        own = super()._own(p)
        if "step" not in own:
            own["step"] = torch.zeros((), device=p.device)
        return own

    def _update(
        self, group: dict[str, Any], rows: list[int], grads: list[Tensor], cut: Cut | None, **options: Tensor | None
    ) -> None:
        lists, settings = self._lists(group, rows, grads, cut)
        steps = [self._own(group["params"][i])["step"] for i in rows]
        if cut:  # each part counts the step on a copy, `_finish` counts it once
            self._cut, steps = True, [step.clone() for step in steps]
        self.ops.adamw(*lists, steps, eps=group["eps"], **settings, **options)

    def _finish(self, skip: Tensor | None) -> None:
        if self._cut:
            self._cut, step = False, self._own(self.param_groups[0]["params"][0])["step"]
            step += 1 if skip is None else skip == 0


def flat_state(optimizer: FastOptimizer, names: Sequence[str], views: Views | None = None) -> dict[str, Tensor]:
    """The state as named tensors, for safetensors.

    Args:
        names: the parameters' names, in the order of `optimizer.param_groups`; of an arena, those of its parts.
        views: of an arena: takes a tensor of its layout apart, into one view a name.

    Returns:
        "<slot>/<name>" fp32 of the parameter's shape for each slot of the optimizer; for D-Lion "d" and
        "numerator_weighted", fp64 0-dim; for AdamW "step", fp32, one number a parameter or arena. Zeros for a parameter that
        never had a gradient. Dense state is given as it is, not copied: write or clone it before the next step.

    Raises:
        ValueError: not one distinct name a parameter.
    """
    owns = [optimizer._own(p) for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    for slot in optimizer.slots:
        parts = [own[slot] for own in owns] if views is None else views(owns[0][slot])
        if len(set(names)) != len(parts) or len(names) != len(parts):
            raise ValueError(
                f"optimizer state: {len(set(names))} distinct names for {len(parts)} parameters; give one each, in order"
            )
        tensors |= {f"{slot}/{name}": part for name, part in zip(names, parts, strict=True)}
    if isinstance(optimizer, DLion):
        tensors |= optimizer.shared
    if isinstance(optimizer, AdamW):
        tensors["step"] = torch.stack([own["step"] for own in owns])
    return tensors


@torch.no_grad()
def load_flat_state(
    optimizer: FastOptimizer, names: Sequence[str], tensors: Mapping[str, Tensor], views: Views | None = None
) -> None:
    """Set the state from `flat_state`'s tensors, on any device, bit by bit. Nothing is set if anything is wrong.

    Raises:
        ValueError: an entry missing, unexpected, or of another shape or dtype; or not one distinct name a parameter.
    """
    expected = flat_state(optimizer, names, views)
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
    for key, value in expected.items():
        value.copy_(tensors[key])
    if isinstance(optimizer, AdamW):  # the stack of the counts is a copy
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, step in zip(params, tensors["step"], strict=True):
            optimizer._own(p)["step"].copy_(step)


def _laid_out(p: Tensor) -> Tensor:
    """The gradient in the parameter's memory order, which autograd sees to and a hand-made gradient may not have."""
    assert p.grad is not None
    return p.grad if p.grad.stride() == p.stride() else torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)


def _require(owner: str, field: str, found: object, holds: bool, want: str) -> None:
    if not holds:
        raise ValueError(f"{owner}: {field} is {found}; give {want}")
