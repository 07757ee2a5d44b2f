"""Data of graphics cards: what predictions of time, memory and throughput start from. Nothing here is measured by this project.

Sources: NVIDIA's data sheets and architecture papers (GA100, GA102, AD102, GH100, GB202), and the tables of compute
capabilities in the CUDA C++ programming guide.
"""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """One SM of an architecture. Rates are a clock; an SM has four schedulers, each with a quarter of every pipe."""

    warps: int  # that an SM holds
    blocks: int
    shared: int  # bytes; a block takes 1 KB beside its own
    block_shared: int  # bytes, the most that one block may use
    fp32: int  # lanes of fused multiply-adds
    integer: int  # lanes of integer and logic operations
    fp64: int
    registers: int = 65536
    special: int = 16  # lanes of exp2, reciprocal and conversions


class Card(NamedTuple):
    """One type of card. Rates of large matmuls, `bf16`, `tf32` and `fp32`, are in TFLOP/s; `fp32` uses no tensor cores."""

    name: str
    sm: int  # the entry of `MULTIPROCESSORS`, and of `launch.ARCHITECTURES`
    sms: int
    ghz: float  # clock under load
    memory: float  # GiB
    bandwidth: float  # GB/s, data sheet
    copy: float  # share of it that a copy reaches
    l2: float  # MiB of cache
    l2_rate: float  # bytes a clock and SM, from L2
    tensor: int  # FLOP a clock and SM: bf16, fp32 sums, dense. tf32 is half
    bf16: float
    tf32: float
    fp32: float


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 167_936, 166_912, fp32=64, integer=64, fp64=32),
    86: Multiprocessor(48, 16, 102_400, 101_376, fp32=128, integer=64, fp64=2),
    89: Multiprocessor(48, 24, 102_400, 101_376, fp32=128, integer=64, fp64=2),
    90: Multiprocessor(64, 32, 233_472, 232_448, fp32=128, integer=64, fp64=64),
    # Every lane of Blackwell does integers, too.
    120: Multiprocessor(48, 24, 102_400, 101_376, fp32=128, integer=128, fp64=2),
}

# Clocks: GeForce below the boost that matmuls of a second reach (1.83, 2.72 and 2.91 GHz by the rates below), because a run of
# weeks is warm; data-centre cards below their boost of 1.98 GHz, because of their power limit; A100 at its boost.
# `copy` is what STREAM-like copies of a gigabyte reach on such cards, `l2_rate` what reads of a resident buffer reach.
# `tensor`: GeForce halves the rate of fp32 sums. `memory` is what CUDA reports as total.
# Matmul rates are measured with large matmuls on RTX 3090 (bf16), RTX 4090, RTX 5090 and H200. H100 is the chip of H200 with
# other memory. The rest are from data sheets, those of tensor cores less a seventh, which large matmuls lose on H200.
# fmt: off
CARDS = {
    "3090":  Card("RTX 3090",  86,  82, 1.80,  24,  936, 0.92,  6,  48,  512,  77,  35.7, 35.7),
    "4090":  Card("RTX 4090",  89, 128, 2.60,  24, 1008, 0.92,  72, 40,  512, 178,  90,   58),
    "5090":  Card("RTX 5090", 120, 170, 2.50,  32, 1792, 0.90,  96, 40,  512, 253, 125,   83),
    "A5000": Card("RTX A5000", 86,  64, 1.62,  24,  768, 0.92,   6, 48, 1024,  95,  48,   27.8),
    "L40S":  Card("L40S",      89, 142, 2.20,  45,  864, 0.92,  96, 40, 1024, 310, 157,   64),
    "A100":  Card("A100",      80, 108, 1.41,  80, 2039, 0.90,  40, 64, 2048, 267, 134,   17),
    "H100":  Card("H100",      90, 132, 1.70,  80, 3350, 0.90,  50, 48, 4096, 853, 427,   48),
    "H200":  Card("H200",      90, 132, 1.70, 139, 4800, 0.895, 50, 48, 4096, 853, 427,   48),
}
# fmt: on
