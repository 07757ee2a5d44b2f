"""Ask cuDNN which workspace its convolutions take on cards that are not here. Nothing runs on a GPU.

    pip install nvidia-cudnn-frontend nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-nvrtc nvidia-cuda-runtime
    python bench/cudnn_workspace.py            print MB by card, precision and images per forward
    python bench/cudnn_workspace.py --write    write fastsd/plan/cudnn_workspace.json, which `fastsd plan` reads

cuDNN's heuristics choose algorithms from a description of the card (`fastsd_kernels/cards.py`), as NVIDIA's frontend passes it.
As in PyTorch (aten/src/ATen/native/cudnn/Conv_v8.cpp), the first algorithm that cuDNN can build is taken, without those that
are not deterministic, and in fp32 without those that use TF32. A step needs the largest workspace of its 3x3 convolutions,
forward and backward, at 512 px. Without a driver, cuDNN gets an empty libcuda, for which a C compiler is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastsd.storage import replace_file
from fastsd_kernels import workload
from fastsd_kernels.cards import CARDS, MULTIPROCESSORS, Card

TABLE = Path(__file__).parents[1] / "fastsd/plan/cudnn_workspace.json"
IMAGES = (1, 2, 4, 8, 16, 32, 64)  # per forward
# What cuDNN's libraries import of the driver. None of it is called.
DRIVER = "cuModuleLoadData cuModuleGetFunction cuModuleUnload cuTensorMapEncodeTiled cuTensorMapEncodeIm2col cuGetErrorString"


def load_cudnn() -> Any:
    """Import NVIDIA's frontend, and give it a driver where there is none."""
    try:
        import cudnn  # type: ignore[import-not-found]
    except ImportError as error:
        sys.exit(f"{error}; install the packages that the first lines of {__file__} name")
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        folder = tempfile.mkdtemp()
        source, library = Path(folder, "driver.c"), Path(folder, "libcuda.so.1")
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER.split()))
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return cudnn


def described(card: Card) -> str:
    """Describe a card in cuDNN's format. Values that no convolution depends on are those of any card."""
    sm = MULTIPROCESSORS[card.sm]
    description: dict[str, Any] = {"version": 1, "deviceName": card.name, "cudaDeviceId": 0, "pciDeviceId": 0}
    description |= {"deviceVer": 10 * card.sm, "driverVer": 13000, "isTccDriver": 0, "supportCoopLaunch": 1, "warpSize": 32}
    description |= {"multiProcessorCount": card.sms, "smCountOrigin": 0, "maxGridSize": [2**31 - 1, 65535, 65535]}
    description |= {"maxBlockSize": [1024, 1024, 64], "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 32 * sm.warps}
    description |= {"regsPerBlock": sm.registers, "maxRegistersPerSM": sm.registers, "maxCtasPerSM": sm.blocks}
    description |= {"maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": sm.block_shared}
    description |= {"oversizedSharedMemoryPerBlock": 0, "reservedSharedMemoryPerBlock": 1024}
    description |= {"smClockRateKHz": int(card.ghz * 1e6), "memClockRateKHz": 10_000_000, "memoryBusWidth": 384}
    return json.dumps(description | {"l2CacheSize": int(card.l2 * 2**20), "totalGlobalMem": int(card.memory * 2**30)})


def workspace(cudnn: Any, device: Any, kind: workload.Conv, images: int, precision: str, product: str) -> tuple[int, str]:
    """Return the bytes of workspace and the name of the algorithm that PyTorch takes for "forward", "input" or "weight"."""
    dtype = cudnn.data_type.BFLOAT16 if precision == "bf16" else cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=dtype, compute_data_type=cudnn.data_type.FLOAT, device_property=device)

    def tensor(name: str, *sizes: int) -> Any:
        return graph.tensor(name=name, dim=list(sizes), stride=_channels_last(*sizes), data_type=dtype)

    side = kind.side * kind.stride
    x, y = (images, kind.inputs, side, side), (images, kind.outputs, kind.side, kind.side)
    w = (kind.outputs, kind.inputs, kind.kernel, kind.kernel)
    geometry = {"padding": [1, 1], "stride": [kind.stride] * 2, "dilation": [1, 1]}
    if product == "forward":
        sizes, result = y, graph.conv_fprop(image=tensor("x", *x), weight=tensor("w", *w), **geometry)
    elif product == "input":
        sizes, result = x, graph.conv_dgrad(loss=tensor("y", *y), filter=tensor("w", *w), **geometry)
    else:
        sizes, result = w, graph.conv_wgrad(image=tensor("x", *x), loss=tensor("y", *y), **geometry)
    result.set_output(True).set_dim(list(sizes)).set_stride(_channels_last(*sizes)).set_data_type(dtype)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    notes = cudnn.numerical_note
    unwanted = [notes.NONDETERMINISTIC, *([] if precision == "bf16" else [notes.DOWN_CONVERT_INPUTS])]
    graph.deselect_numeric_notes(unwanted + ([notes.TENSOR_CORE] if precision == "fp32" else []))
    for index in range(graph.get_execution_plan_count()):
        try:
            graph.build_plan_at_index(index)
        except (RuntimeError, cudnn.cudnnGraphNotSupportedError):  # deselected, or not for this card
            continue
        return graph.get_workspace_size_plan_at_index(index), graph.get_plan_name_at_index(index)
    raise RuntimeError(f"cuDNN has no algorithm for {kind}, {product}, {images} images, {precision}")


def _channels_last(batch: int, channels: int, height: int, width: int) -> list[int]:
    return [channels * height * width, 1, channels * width, channels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    cudnn, kinds = load_cudnn(), [kind for kind in workload.CONV if kind.kernel == 3]
    table: dict[str, Any] = {"cudnn": cudnn.backend_version(), "images": IMAGES}
    for card in CARDS.values():
        device = cudnn.create_device_properties(described(card))
        for precision in ("bf16", "tf32", "fp32"):
            row = []
            for images in IMAGES:
                pairs = [(kind, product) for kind in kinds for product in ("forward", "input", "weight")]
                row.append(max(workspace(cudnn, device, kind, images, precision, product)[0] for kind, product in pairs))
            print(f"{card.name:10} {precision}  " + "  ".join(f"{size / 1e6:7.1f}" for size in row), flush=True)
            table.setdefault(precision, {})[card.name] = row
    if arguments.write:
        rows = (f'"{key}": {_lines(value) if isinstance(value, dict) else json.dumps(value)}' for key, value in table.items())
        replace_file(TABLE, "{\n  " + ",\n  ".join(rows) + "\n}\n")


def _lines(rows: dict[str, list[int]]) -> str:
    return "{\n    " + ",\n    ".join(f'"{name}": {json.dumps(row)}' for name, row in rows.items()) + "\n  }"


if __name__ == "__main__":
    main()
