"""Lion: the sign of an interpolated momentum is the update.

    p = p (1 - lr wd)
    u = sign(b1 m + (1 - b1) g)        p = p - lr u
    m = b2 m + (1 - b2) g

Layout: lists of fp32 tensors of any shape and strides; p, g, m of one parameter lie at the same place in their lists.
Bytes moved at best, per element: p, m, g read, p, m written: 20.  Each line above is one or two operations of PyTorch,
in lion-pytorch's order, so on a CPU the result has its bits.

`pieces` and `unless` below serve `dlion.py` and `adamw.py` too: they cut the lists into runs that stay in a CPU's cache
between the operations, and undo a step that is to be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements of one run. Four arrays and their scratch fit a shared CPU cache (2**16 and below starves the threads);
# on a GPU a run bounds the scratch only, and launches should be few.
_RUN_CPU = 1 << 18
_RUN_GPU = 1 << 26


@torch.no_grad()
def lion_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """One step of Lion, in place on `params` and `exp_avgs`.

    Args:
        params, grads, exp_avgs: fp32, equal shapes at equal places. Gradients are only read.
        lr: step size in units of the parameter; a float or a 0-dim fp32 tensor on the device.
        betas: (of the update, of the momentum).
        weight_decay: multiplies lr.
        skip: 0-dim bool or float on the device; nonzero leaves every byte as it was, whatever the gradients hold.

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2; lion-pytorch 0.2.5.
    """
    beta1, beta2 = betas
    for p, g, m in pieces(params, grads, exp_avgs):
        with unless(skip, p, m):
            update = torch._foreach_mul(m, beta1)
            torch._foreach_add_(update, g, alpha=1 - beta1)
            torch._foreach_sign_(update)
            # A sign times lr is exact, so this rounds as lion-pytorch's single p.add_(u, alpha=-lr) does.
            torch._foreach_mul_(update, -lr)
            if weight_decay:
                torch._foreach_mul_(p, 1 - lr * weight_decay)
            torch._foreach_add_(p, update)
            torch._foreach_mul_(m, beta2)
            torch._foreach_add_(m, g, alpha=1 - beta2)


def pieces(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Cut parallel lists of tensors into runs, each given as the same number of lists.

    A run holds about 2**18 elements a list on a CPU, 2**26 elsewhere: several small tensors or a part of a big one, as
    1-D views in memory order. The cut depends on shapes only, so sums taken run by run have a fixed order. Tensors at
    one place that differ in strides, or have gaps, stay whole and keep their shape. A one-element tensor (a factor of
    its parameter) stays beside every part of a big neighbour.
    """
    if not lists[0]:
        return
    limit = _RUN_CPU if lists[0][0].is_cpu else _RUN_GPU
    run: list[tuple[Tensor, ...]] = []
    held = 0
    for row in zip(*lists, strict=True):
        size = row[0].numel()
        for part in _cut(row, size, limit):
            if run and held + part[0].numel() > limit:
                yield [list(column) for column in zip(*run, strict=True)]
                run, held = [], 0
            run.append(part)
            held += part[0].numel()
    yield [list(column) for column in zip(*run, strict=True)]


def _cut(row: tuple[Tensor, ...], size: int, limit: int) -> Iterator[tuple[Tensor, ...]]:
    full = [t for t in row if t.numel() == size]
    shape, stride = full[0].shape, full[0].stride()
    span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if span != size or any(t.stride() != stride or t.shape != shape for t in full):
        return iter([row])
    flat = [t.as_strided((size,), (1,)) if t.numel() == size else t for t in row]
    if size <= limit:
        return iter([tuple(flat)])
    count = -(-size // limit)
    return zip(*(t.split(limit) if t.numel() == size else (t,) * count for t in flat), strict=True)


@contextmanager
def unless(skip: Tensor | None, *lists: Sequence[Tensor]) -> Iterator[None]:
    """Put the bytes of `lists` back after the block where the device flag `skip` is nonzero, without reading it here.

    Copies and selects rather than multiplying by zero, which would keep a NaN and turn -0.0 into 0.0.
    """
    if skip is None:
        yield
        return
    tensors = [t for column in lists for t in column]
    kept = [t.clone() for t in tensors]
    yield
    undo = skip != 0
    for old, new in zip(kept, tensors, strict=True):
        torch.where(undo, old, new, out=new)
