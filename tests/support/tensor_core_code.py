"""PTX of the attention kernels: their tensor-core instructions and conversions. A program, like `step_launches.py`.

Prints, as JSON for each mode, the options of each kernel, its conversions to TF32 ("rounded") and its TF32 matmul instructions.
"""

import json
import re

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from fastsd_kernels import workload
from fastsd_kernels.attention import attention_backward, attention_forward
from fastsd_kernels.launch import ARCHITECTURES, meta, recording
from fastsd_kernels.sass import Compilation, specialise


def ptx(compilation: Compilation) -> str:
    """Compile down to PTX, which is most of the way and takes no assembler."""
    target = GPUTarget("cuda", compilation.target, 32)
    backend = make_backend(target)
    options = backend.parse_options(compilation.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    code = compilation.source.make_ir(target, options, implementation, modules, context)
    stages, metadata = {}, {"target": target, **options.__dict__}
    backend.add_stages(stages, options, compilation.source.language)
    for name in ("ttir", "ttgir", "llir", "ptx"):
        code = stages[name](code, metadata)
    return code


def attention(target: int, mode: str, head_dims: tuple[int, ...]) -> list[dict[str, object]]:
    """Return the options and counts of each kernel of self-attention, forward and backward."""
    dtype, precision = (torch.bfloat16, "ieee") if mode == "bf16" else (torch.float32, mode)
    with recording(target) as launches:
        for kind in workload.ATTENTION:
            if kind.queries == kind.keys > 64 and kind.head_dim in head_dims:
                q = meta(16, kind.queries, kind.heads, kind.head_dim, dtype=dtype)
                o, lse = attention_forward(q, q, q, precision)
                attention_backward(o, q, q, q, o, lse, precision)
    kernels = []
    for launch in launches:
        code = ptx(specialise(launch, target))
        rounded, matmuls = code.count("cvt.rna.tf32"), len(re.findall(r"mma\S*\.tf32\.tf32", code))
        counts = {"kernel": launch.kernel.__name__, "target": target, "rounded": rounded, "matmuls": matmuls}
        kernels.append(launch.options | counts)
    return kernels


def main() -> None:
    # All targets but 90 have the same instructions. So one of them tells of heads too wide to hold.
    head_dims = {target: (40, 160) if target in (89, 90) else (40,) for target in ARCHITECTURES}
    kernels = {"tf32": [kernel for target in ARCHITECTURES for kernel in attention(target, "tf32", head_dims[target])]}
    kernels |= {mode: [*attention(89, mode, (40,)), *attention(90, mode, (40,))] for mode in ("bf16", "ieee")}
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
