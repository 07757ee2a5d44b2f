"""The work of one SD1.5 UNet forward at 512 px (64 x 64 latents, 77 text tokens), as data, per image.

Tests, benchmarks and the atlas take their shapes from here only; a test derives the tables again from the module.
Each table is {kind: count}.  FLOPs count a multiply-add as two, and include only matmuls and convolutions.
"""

from __future__ import annotations

from typing import NamedTuple


class Attention(NamedTuple):
    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        return 4 * self.queries * self.keys * self.heads * self.head_dim


class GroupNorm(NamedTuple):
    channels: int
    side: int  # height and width
    groups: int
    eps: float
    silu: bool
    shift: bool  # the time embedding is added first
    skip: int = 0  # of the channels, those of a skip connection


class LayerNorm(NamedTuple):
    rows: int
    features: int
    eps: float


class Geglu(NamedTuple):
    rows: int
    features: int  # of the output; the input has twice as many


class Conv(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    stride: int
    side: int  # of the output

    @property
    def flops(self) -> int:
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.side**2


class Linear(NamedTuple):
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


BATCH = 16  # images of a launch whose code the atlas reads
ATTENTION = {
    Attention(4096, 4096, 8, 40): 5,
    Attention(4096, 77, 8, 40): 5,
    Attention(1024, 1024, 8, 80): 5,
    Attention(1024, 77, 8, 80): 5,
    Attention(256, 256, 8, 160): 5,
    Attention(256, 77, 8, 160): 5,
    Attention(64, 77, 8, 160): 1,
    Attention(64, 64, 8, 160): 1,
}
GROUP_NORM = {
    GroupNorm(2560, 16, 32, 1e-05, True, False, 1280): 2,
    GroupNorm(2560, 8, 32, 1e-05, True, False, 1280): 3,
    GroupNorm(1920, 32, 32, 1e-05, True, False, 640): 1,
    GroupNorm(1920, 16, 32, 1e-05, True, False, 640): 1,
    GroupNorm(1280, 32, 32, 1e-05, True, False, 640): 1,
    GroupNorm(1280, 16, 32, 1e-06, False, False): 5,
    GroupNorm(1280, 16, 32, 1e-05, True, True): 5,
    GroupNorm(1280, 16, 32, 1e-05, True, False): 1,
    GroupNorm(1280, 8, 32, 1e-06, False, False): 1,
    GroupNorm(1280, 8, 32, 1e-05, True, True): 7,
    GroupNorm(1280, 8, 32, 1e-05, True, False): 4,
    GroupNorm(960, 64, 32, 1e-05, True, False, 320): 1,
    GroupNorm(960, 32, 32, 1e-05, True, False, 320): 1,
    GroupNorm(640, 64, 32, 1e-05, True, False, 320): 2,
    GroupNorm(640, 32, 32, 1e-06, False, False): 5,
    GroupNorm(640, 32, 32, 1e-05, True, True): 5,
    GroupNorm(640, 32, 32, 1e-05, True, False): 1,
    GroupNorm(640, 16, 32, 1e-05, True, False): 1,
    GroupNorm(320, 64, 32, 1e-06, False, False): 5,
    GroupNorm(320, 64, 32, 1e-05, True, True): 5,
    GroupNorm(320, 64, 32, 1e-05, True, False): 3,
    GroupNorm(320, 32, 32, 1e-05, True, False): 1,
}
# Before a resnet's first convolution where the channels change: the matmul of the shortcut adds to the gradient of their input.
# Those of a skip connection, and those with a shift, do not add another gradient to it either.
GROUP_NORM_WITHOUT_RESIDUAL = {GroupNorm(640, 16, 32, 1e-05, True, False), GroupNorm(320, 32, 32, 1e-05, True, False)}
# The SDXL VAE at 512 px, encoder and decoder together.
VAE_GROUP_NORM = {
    GroupNorm(512, 256, 32, 1e-06, True, False): 1,
    GroupNorm(512, 128, 32, 1e-06, True, False): 9,
    GroupNorm(512, 64, 32, 1e-06, True, False): 19,
    GroupNorm(512, 64, 32, 1e-06, False, False): 2,
    GroupNorm(256, 512, 32, 1e-06, True, False): 1,
    GroupNorm(256, 256, 32, 1e-06, True, False): 8,
    GroupNorm(256, 128, 32, 1e-06, True, False): 1,
    GroupNorm(128, 512, 32, 1e-06, True, False): 10,
    GroupNorm(128, 256, 32, 1e-06, True, False): 1,
}
# Our VAE encoder at 512 px with these kernels: a convolution's bias is the shift of the norm after it.
VAE_ENCODER_GROUP_NORM = {
    GroupNorm(512, 128, 32, 1e-06, True, True): 3,
    GroupNorm(512, 64, 32, 1e-06, True, True): 9,
    GroupNorm(512, 64, 32, 1e-06, False, True): 1,
    GroupNorm(256, 256, 32, 1e-06, True, True): 3,
    GroupNorm(256, 128, 32, 1e-06, True, True): 1,
    GroupNorm(128, 512, 32, 1e-06, True, True): 4,
    GroupNorm(128, 256, 32, 1e-06, True, True): 1,
}
LAYER_NORM = {
    LayerNorm(4096, 320, 1e-05): 15,
    LayerNorm(1024, 640, 1e-05): 15,
    LayerNorm(256, 1280, 1e-05): 15,
    LayerNorm(64, 1280, 1e-05): 3,
}
GEGLU = {
    Geglu(4096, 1280): 5,
    Geglu(1024, 2560): 5,
    Geglu(256, 5120): 5,
    Geglu(64, 5120): 1,
}
CONV = {
    Conv(2560, 1280, 3, 1, 16): 2,
    Conv(2560, 1280, 3, 1, 8): 3,
    Conv(2560, 1280, 1, 1, 16): 2,
    Conv(2560, 1280, 1, 1, 8): 3,
    Conv(1920, 1280, 3, 1, 16): 1,
    Conv(1920, 1280, 1, 1, 16): 1,
    Conv(1920, 640, 3, 1, 32): 1,
    Conv(1920, 640, 1, 1, 32): 1,
    Conv(1280, 1280, 3, 2, 8): 1,
    Conv(1280, 1280, 3, 1, 32): 1,
    Conv(1280, 1280, 3, 1, 16): 7,
    Conv(1280, 1280, 3, 1, 8): 11,
    Conv(1280, 640, 3, 1, 32): 1,
    Conv(1280, 640, 1, 1, 32): 1,
    Conv(960, 640, 3, 1, 32): 1,
    Conv(960, 640, 1, 1, 32): 1,
    Conv(960, 320, 3, 1, 64): 1,
    Conv(960, 320, 1, 1, 64): 1,
    Conv(640, 1280, 3, 1, 16): 1,
    Conv(640, 1280, 1, 1, 16): 1,
    Conv(640, 640, 3, 2, 16): 1,
    Conv(640, 640, 3, 1, 64): 1,
    Conv(640, 640, 3, 1, 32): 6,
    Conv(640, 320, 3, 1, 64): 2,
    Conv(640, 320, 1, 1, 64): 2,
    Conv(320, 640, 3, 1, 32): 1,
    Conv(320, 640, 1, 1, 32): 1,
    Conv(320, 320, 3, 2, 32): 1,
    Conv(320, 320, 3, 1, 64): 7,
    Conv(320, 4, 3, 1, 64): 1,
    Conv(4, 320, 3, 1, 64): 1,
}
LINEAR = {
    Linear(4096, 1280, 320): 5,
    Linear(4096, 320, 2560): 5,
    Linear(4096, 320, 960): 5,
    Linear(4096, 320, 320): 25,
    Linear(1024, 2560, 640): 5,
    Linear(1024, 640, 5120): 5,
    Linear(1024, 640, 1920): 5,
    Linear(1024, 640, 640): 25,
    Linear(256, 5120, 1280): 5,
    Linear(256, 1280, 10240): 5,
    Linear(256, 1280, 3840): 5,
    Linear(256, 1280, 1280): 25,
    Linear(77, 768, 2560): 6,
    Linear(77, 768, 1280): 5,
    Linear(77, 768, 640): 5,
    Linear(64, 5120, 1280): 1,
    Linear(64, 1280, 10240): 1,
    Linear(64, 1280, 3840): 1,
    Linear(64, 1280, 1280): 5,
    Linear(1, 1280, 1280): 13,
    Linear(1, 1280, 640): 5,
    Linear(1, 1280, 320): 5,
    Linear(1, 320, 1280): 1,
}
# Parameter tensors as the module holds them (q/k/v fused): {elements: count}.
PARAMETERS = {
    29491200: 5,
    22118400: 1,
    14745600: 20,
    13107200: 6,
    11059200: 1,
    7372800: 2,
    6553600: 6,
    5529600: 1,
    4915200: 6,
    3686400: 8,
    3276800: 10,
    2764800: 1,
    2457600: 1,
    1966080: 6,
    1843200: 3,
    1638400: 48,
    1228800: 6,
    983040: 5,
    921600: 8,
    819200: 12,
    614400: 1,
    491520: 5,
    409600: 36,
    307200: 6,
    204800: 3,
    102400: 25,
    11520: 2,
    10240: 6,
    5120: 5,
    2560: 15,
    1920: 4,
    1280: 162,
    960: 4,
    640: 104,
    320: 103,
    4: 1,
}

FORWARD_FLOPS = sum(kind.flops * count for table in (ATTENTION, CONV, LINEAR) for kind, count in table.items())
