"""The operations as types: a `Protocol` for each, the tables of implementations, and the record with which an op's file ends.

`Ops` is a frozen table with one implementation of every operation; `__init__.py` builds REFERENCE, TRITON and CPU from the
records.  `ForwardBackwardOps` has forward, recomputation and backward of the differentiable operations (`forward_backward.py`).
The references document arguments and errors.

Shapes: B images, C channels, H x W positions, N queries or tokens, L keys, H heads, D head size, F features, T timesteps,
K partial sums.  Read next: `geglu.py`, the shortest kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Required, TypedDict, TypeVar, Unpack, overload

from torch import Tensor

F = TypeVar("F")
Calls = Iterator[tuple[str, str]]  # see `Op.calls`
Tensors = Sequence[Tensor]
Shift = Tensor | None  # (B, C), added to an image before its norm
Images = tuple[Tensor, ...]  # x, or x and a skip connection, whose channels follow those of x
Partials = tuple[Tensor | None, ...]  # the partial statistics of `Images` (`group_norm_statistics.py`)
# Memory for the gradients of a layer's vectors, fp32 or in their dtype, and True if the gradients are to be added to it.
Destination = tuple[list[Tensor], bool]


class StepOptions(TypedDict, total=False):
    """Options of every optimizer's op beside its hyper-parameters. None is the same as leaving an option out.

    Attributes:
        found_inf: 0-dim bool or float on the device; nonzero leaves every byte unchanged, whatever the gradients hold.
        overflow: 0-dim bool on the device, set to true if an element kept its weight and state because the new ones would not
            be finite. It is never set to false.
        masters_lo: int16, low halves of the masters. The parameters, then bf16, are the high halves.
        scale: 0-dim fp32 on the device, multiplies the gradients: one over the loss scale, times the clip factor.
        emas: fp32, K averages of each parameter along a leading dimension, moved towards its new value:
            ema_k + (1 - ema_decay_k)(p - ema_k).
        ema_decay: a float if K is 1, or a tensor of K numbers on the device; fp64, because 1 - decay is small.
            `arena.EMA_DECAY` by default.
    """

    found_inf: Tensor | None
    overflow: Tensor | None
    masters_lo: Tensors | None
    scale: Tensor | None
    emas: Tensors | None
    ema_decay: float | Tensor


class StepSettings(StepOptions, total=False):
    """The keyword arguments of every optimizer's op: hyper-parameters and options."""

    lr: Required[float | Tensor]
    betas: tuple[float, float]
    weight_decay: float


class Attention(Protocol):
    def __call__(self, q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, precision: str = ...) -> Tensor:
        """Return o (B, N, H, D)."""


class GroupNorm(Protocol):
    def __call__(
        self, x_BCHW: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = ..., shift_BC: Shift = ...
    ) -> Tensor:
        """Return y (B, C, H, W), channels last."""


class LayerNorm(Protocol):
    @overload
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: None = ...) -> Tensor:
        """Return y, like x."""

    @overload
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and x + residual."""


class Geglu(Protocol):
    def __call__(self, x_2F: Tensor) -> Tensor:
        """Return y (..., F)."""


class Normal(Protocol):
    def __call__(self, seed: int, purpose: int, position_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers, fp32 (B, *shape)."""


class AddNoise(Protocol):
    def __call__(
        self,
        latents_BCHW: Tensor,
        positions_B: Tensor,
        t_B: Tensor,
        signal_T: Tensor,
        sigma_T: Tensor,
        seed: int,
        *,
        prediction: str = ...,
    ) -> tuple[Tensor, Tensor]:
        """Return x_t and target, fp32 (B, C, H, W)."""


class GradientNorm(Protocol):
    def __call__(self, grads: Tensors, *, merge: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm, 0-dim fp32, and found_inf, 0-dim bool. `merge` adds other processes' partial sums, fp64 (K,)."""


class Lion(Protocol):
    def __call__(self, params: Tensors, grads: Tensors, exp_avgs: Tensors, **settings: Unpack[StepSettings]) -> None: ...


class DLion(Protocol):
    def __call__(
        self, params: Tensors, grads: Tensors, exp_avgs: Tensors, s: Tensors, d: Tensor, **settings: Unpack[StepSettings]
    ) -> tuple[Tensor, Tensor]:
        """Return partial sums, dots (K) and l1 (K)."""


class DLionEstimate(Protocol):
    def __call__(
        self,
        d: Tensor,
        numerator_weighted: Tensor,
        dots_K: Tensor,
        l1_K: Tensor,
        *,
        lr: float | Tensor,
        beta2: float = ...,
        found_inf: Tensor | None = ...,
    ) -> None: ...


class AdamW(Protocol):
    def __call__(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: Tensors,
        exp_avg_sqs: Tensors,
        steps: Tensors,
        *,
        eps: float = ...,
        **settings: Unpack[StepSettings],
    ) -> None: ...


class AttentionForward(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        """Return o (B, N, H, D) and lse, which only the backward of the same table reads."""


class AttentionBackward(Protocol):
    def __call__(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, precision: str, *, self_attention: bool
    ) -> tuple[Tensor, Tensor]:
        """Return gradients packed like the projections: (dqkv_BN3HD, empty) for `self_attention`, else (dq_BNHD, dkv_BL2HD)."""


class GroupNormForward(Protocol):
    def __call__(
        self,
        images: Images,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        shift: Shift,
        *,
        silu: bool,
        partials: Partials = ...,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, mean and rstd. `partials` are the images' partial statistics, if they are known."""


class GroupNormRecompute(Protocol):
    def __call__(
        self,
        images: Images,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        shift: Shift,
        *,
        silu: bool,
    ) -> Tensor:
        """Return y, with the bits of the forward."""


class GroupNormBackward(Protocol):
    def __call__(
        self,
        dy: Tensor,
        images: Images,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        shift: Shift,
        *,
        silu: bool,
        through: Tensor | None,
        output: bool,
        into: Destination | None = ...,
    ) -> tuple[Images, Tensor | None, Tensor | None, Shift, Tensor | None]:
        """Return dimages, dweight, dbias, dshift, and with `output` y, with the bits of the forward. dy may be overwritten.

        `through`, the gradient of a single image from another use, is added to its own. dweight and dbias are None if they went
        `into` memory, dshift without a shift.
        """


class AddStatistics(Protocol):
    def __call__(self, h: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return h + bias (C,) + residual, channels last, and its partial statistics, or None if the norm computes its own."""


class LayerNormForward(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, s = x + residual, mean and rstd."""


class LayerNormRecompute(Protocol):
    def __call__(self, s: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return y, with the bits of the forward."""


class LayerNormBackward(Protocol):
    def __call__(
        self,
        dy: Tensor,
        s: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        ds: Tensor | None,
        *,
        output: bool,
        sums: bool = ...,
        into: Destination | None = ...,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return (ds, dweight, dbias, sum of ds, y): the whole gradient of s, where `ds` is that from its other uses.

        Its sum over all rows is computed with `sums`, y with `output`; otherwise they are None. The three vectors are None if
        they went `into` memory. y has the bits of the forward. It may overwrite dy, which must
        not be used afterwards.
        """


class GegluBackward(Protocol):
    def __call__(
        self, dy_F: Tensor, x_2F: Tensor, *, output: bool, sums: bool, into: Destination | None = ...
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return dx (..., 2F), with `output` y (..., F), and with `sums` the sum of dx over all rows (2F).

        The sum is None if it went `into` memory. y has the bits of the forward. It may overwrite dy, which must not be used
        afterwards.
        """


@dataclass(frozen=True)
class ForwardBackwardOps:
    """One implementation of every function. `_recompute` rebuilds the forward's y from the saved tensors.

    With `fused`, a layer leaves a convolution's bias to the norm or the sum after it, and gives a norm x and a skip connection
    as two images. On a GPU, the bias and the concatenation would be passes over memory. On a CPU, the bias is not.
    """

    attention: AttentionForward
    attention_backward: AttentionBackward
    group_norm: GroupNormForward
    group_norm_recompute: GroupNormRecompute
    group_norm_backward: GroupNormBackward
    add_statistics: AddStatistics
    layer_norm: LayerNormForward
    layer_norm_recompute: LayerNormRecompute
    layer_norm_backward: LayerNormBackward
    geglu: Geglu
    geglu_backward: GegluBackward
    fused: bool


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation."""

    name: str
    # Operations of the model. They are differentiable.
    attention: Attention
    group_norm: GroupNorm
    layer_norm: LayerNorm
    geglu: Geglu
    forward_backward: ForwardBackwardOps  # of the four above, for layers that save less for backward
    # Operations of the step. They work in place or have no gradient.
    normal: Normal
    add_noise: AddNoise
    gradient_norm: GradientNorm
    lion: Lion
    dlion: DLion
    dlion_estimate: DLionEstimate
    adamw: AdamW


@dataclass(frozen=True)
class Op(Generic[F]):
    """All that the tables, the atlas and the benchmarks know about one operation. Its file ends with it.

    Attributes:
        name: the field of `Ops`.
        reference, triton, cpu: the implementations. Without one in C, the table CPU has the reference.
        calls: makes every launch of the workload's shapes, for the atlas. It runs on meta tensors inside `launch.recording`,
            and yields (shapes, dtype or precision) after the launches of each.
        bytes: maps a kind of `workload` and the bytes of a number that may be bf16 to the fewest bytes that forward and
            backward must move: per image, or, for operations of the step, of that many numbers.
    """

    name: str
    reference: F
    triton: F
    calls: Callable[[], Calls]
    bytes: Callable[[Any, int], int]
    cpu: F | None = None
