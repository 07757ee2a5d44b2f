"""Messages of ranks with sharded state (`shards.py`) about their updates.

Two small messages go with a step: before the update the sums of squares of the gradients, after it the loss, the flags of
elements that kept their weights, and D-Lion's two sums.  They cannot be one, because D-Lion's sums are results of the update.

Optimizers add up blocks of `BLOCK` elements.  The sums of all ranks' blocks are put into the order of the arena, in which one
process adds them.  So a GPU has the bits of a stage without shards.  The kernels of a CPU add up whole pieces, and D-Lion's d
differs in its last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fastsd.train.optim import FastOptimizer
from fastsd.train.ranks import Ranks
from fastsd.train.shards import Shards
from fastsd.train.trainable import TrainableComponent


class ShardedUpdates:
    """Messages of the ranks about the updates of their shards.

    Args:
        components: the trained components, in the order in which gradients and optimizers are passed.
    """

    def __init__(self, ranks: Ranks, components: Mapping[str, TrainableComponent]) -> None:
        self.ranks, self._components = ranks, components
        self._blocks = [count for component in components.values() for count in _shards(component).blocks]

    @property
    def sent_bytes(self) -> int:
        """Bytes of weights that each rank sends in a step."""
        sizes = [c.master_hi.numel() * c.master_hi.element_size() for c in self._components.values() if c.master_hi is not None]
        return sum(sizes) * (self.ranks.world - 1) // self.ranks.world

    def all_sums(self, sums_K: Tensor) -> Tensor:
        """Return the partial sums of all ranks in the arenas' order."""
        return _in_order(self._blocks, self._gathered(sums_K))

    def any_rank(self, flag: Tensor) -> Tensor:
        """Return True if a 0-dim flag on the device is True on any rank."""
        return self._gathered(flag.view(1)).any()

    def finish(self, loss: Tensor, optimizers: Mapping[str, FastOptimizer]) -> Tensor:
        """Exchange the new weights and the sums of the update. Return the sum of the ranks' losses."""
        works = []
        for component in self._components.values():
            shards, weights = _shards(component), component.master_hi
            assert weights is not None
            pairs = zip(shards.chunks, shards.pieces, strict=True)
            works += [self.ranks.gather(weights[chunk], weights[piece]) for chunk, piece in pairs]
        sums = [optimizer.partial_sums() for optimizer in optimizers.values()]
        sums_RS = self._gathered(torch.cat([loss.double().view(1), *sums]))
        losses_R, *gathered = sums_RS.split([1, *map(len, sums)], dim=1)
        for (name, optimizer), sums_RK in zip(optimizers.items(), gathered, strict=True):
            blocks = _shards(self._components[name]).blocks
            optimizer.merge_sums(sums_RK, partial(_in_order, blocks))
        self.ranks.finish(works)
        total = torch.zeros_like(loss)
        for other in losses_R.to(loss.dtype).unbind():  # in the order of the ranks, as without shards
            total += other.view(())
        return total

    def _gathered(self, numbers: Tensor) -> Tensor:
        received = numbers.new_empty(self.ranks.world * len(numbers))
        self.ranks.finish([self.ranks.gather(received, numbers)])
        return received.view(self.ranks.world, -1)


def _shards(component: TrainableComponent) -> Shards:
    assert component.shards is not None
    return component.shards


def _in_order(blocks: list[int], sums_RK: Tensor) -> Tensor:
    """Put partial sums of all ranks' pieces into the order of the arena. There is one for each block, or one for each piece."""
    if sums_RK.shape[1] != sum(blocks):
        return sums_RK.T.reshape(-1)
    return torch.cat([sums.reshape(-1) for sums in sums_RK.split(blocks, dim=1)])
