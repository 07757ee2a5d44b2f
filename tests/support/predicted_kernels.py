"""Predictions for kernels that are compiled here. A program, like `step_launches.py`. Prints JSON:

copy        predicted and least microseconds of a copy of each size in MiB, on an RTX 4090
instructions, last   number of the copy's instructions, and the last one's address
problems    the atlas' problems of dk and dv with tiles that fit and with others, on sm_89 and sm_90
"""

import json
from unittest import mock

import torch
import triton
import triton.language as tl

from fastsd_kernels import atlas, attention, workload
from fastsd_kernels.attention_tiles import AttentionTile
from fastsd_kernels.cards import CARDS
from fastsd_kernels.launch import Launch, meta
from fastsd_kernels.prediction import Predictor
from fastsd_kernels.sass import compile_launch, specialise


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, offs < n), offs < n)


def copies() -> dict[str, object]:
    card, times = CARDS["4090"], {}
    for size in (16, 64, 256):
        x = meta(size << 18)
        launch = Launch(copy, (x.numel() // 2048,), (x, x, x.numel()), {"BLOCK": 2048, "num_warps": 4})
        compilation = specialise(launch, card.sm)
        compiled = compile_launch(compilation)
        us = Predictor().predict(card, compilation.key, compiled, launch).us
        times[size] = us, 2 * (size << 20) / (card.bandwidth * card.copy * 1e3)
    return {"copy": times, "instructions": len(compiled.instructions), "last": compiled.instructions[-1].address}


def problems(tile: AttentionTile, target: int) -> list[str]:
    """Return the atlas' problems of attention to 77 keys on sm_`target` if dk and dv have this tile."""
    choose, kind = attention.choose_tile, workload.Attention(4096, 77, 8, 40)

    def calls():
        q, k = (meta(8, rows, kind.heads, kind.head_dim, dtype=torch.bfloat16) for rows in (kind.queries, kind.keys))
        o, lse = attention.attention_forward(q, k, k, "ieee")
        attention.attention_backward(o, q, k, k, o, lse, "ieee")
        yield "4096x77 d40", "bf16"

    def chosen(kernel, *arguments):
        return tile if kernel == "dkdv" else choose(kernel, *arguments)

    with mock.patch.object(attention, "choose_tile", chosen), mock.patch.dict(atlas.OPS, attention=mock.Mock(calls=calls)):
        entries = [entry for entry in atlas.survey("attention", target) if entry.options.get("WITH_V")]
    return [problem for entry in entries for problem in entry.problems]


def main() -> None:
    tiles = {
        "sm_89, 1 warp, 16 keys": (AttentionTile(64, 16, 1, 2), 89),
        "sm_89, 8 warps, 32 keys": (AttentionTile(64, 32, 8, 2), 89),
        "sm_90, 4 warps, 64 keys": (AttentionTile(64, 64, 4, 2), 90),
        "sm_90, 1 warp, 16 keys": (AttentionTile(64, 16, 1, 2), 90),
        "sm_90, 8 warps, 64 keys": (AttentionTile(64, 64, 8, 2), 90),
    }
    print(json.dumps(copies() | {"problems": {name: problems(*tile) for name, tile in tiles.items()}}))


if __name__ == "__main__":
    main()
