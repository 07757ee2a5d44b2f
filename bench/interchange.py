"""Convert a random SD1.5 of full size to every format and back, each time in its own process.

    python bench/interchange.py [--folder DIR] [--json FILE]

The script converts a diffusers folder to a single file and back, with the scaling factor 0.18215 and with 0.13025, which is
folded. It compares all bits, and the tensor names with those that diffusers' conversion functions know. It also compares one
image from the same latents, drawn by diffusers from the folder, by diffusers from the file, and by our sampler. The peak memory
of each process is reported, and that of a process that only imports the libraries. Needs 25 GB of disk and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import make_base

from fastsd.bench.counters import stamp
from fastsd.storage import replace_file

STEMS = {"unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model", "text_encoder": "text_encoder/model"}
PROMPT, SIZE, STEPS, GUIDANCE = "a red circle", 128, 2, 3.0


def run_python(code: str, *words: str) -> dict[str, float]:
    """Run Python code in its own process. Return its seconds and peak resident MB."""
    start = time.perf_counter()
    print_peak = 'print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))'
    result = subprocess.run([sys.executable, "-c", f"{code}\n{print_peak}", *words], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_mb": round(int(result.stdout.split()[-1]) / 1024)}


def convert(*words: Path | str) -> dict[str, float]:
    print("$ fastsd convert", *words, flush=True)
    return run_python("from fastsd.cli import app\napp(standalone_mode=False)", "convert", *map(str, words))


def equal(a: Path, b: Path) -> dict[str, str]:
    """Count the tensors of each component that have the same names and bits in both models."""
    from fastsd.storage import TensorFile

    counts = {}
    for component, stem in STEMS.items():
        left, right = TensorFile(a / f"{stem}.safetensors"), TensorFile(b / f"{stem}.safetensors")
        assert set(left) == set(right), component
        num_equal = sum(torch.equal(left[name], right[name]) for name in left)
        counts[component] = f"{num_equal} of {len(left)} bit-equal"
    return counts


def known_names(file: Path) -> str:
    """Count the names that diffusers' conversion functions know. Raises AssertionError if they give no complete model."""
    from diffusers.loaders import single_file_utils

    from fastsd.model.shapes import SD15_TEXT, SD15_VAE
    from fastsd.model.unet import UNetConfig
    from fastsd.model.weights import expected_tensors
    from fastsd.storage import TensorFile

    state: dict[str, Any] = {name: torch.empty(t.shape, device="meta") for name, t in TensorFile(file).stored().items()}
    num_known = 0
    for component, config, conversion in (
        ("unet", UNetConfig.sd15().to_diffusers(), single_file_utils.convert_ldm_unet_checkpoint),
        ("vae", SD15_VAE, single_file_utils.convert_ldm_vae_checkpoint),
        ("text_encoder", SD15_TEXT, lambda state, config: single_file_utils.convert_ldm_clip_checkpoint(state)),
    ):
        converted = conversion(dict(state), config)
        expected_shapes = {name: t.shape for name, t in expected_tensors(component, config, "").items()}
        assert {name: t.shape for name, t in converted.items()} == expected_shapes, component
        num_known += len(converted)
    return f"{num_known} of {len(state)} names known, none missing"


def images(folder: Path, file: Path) -> dict[str, float]:
    """Return the largest channel difference (0 to 1) between our image and each of diffusers', and the spread of ours."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from fastsd.config.schema import ModelTable, SampleTable
    from fastsd.sampling.generate import denoise, load_to_sample
    from fastsd_kernels import noise

    eps = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([0]), (4, SIZE // 8, SIZE // 8))

    def diffusers_image(load: Any, source: Path, **options: Any) -> torch.Tensor:
        pipe = load(source, local_files_only=True, **options)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=eps, output_type="pt").images[0]

    model = load_to_sample(ModelTable(base=str(folder)), "cpu")
    latents = denoise(model, [PROMPT], eps, [0], SampleTable(sampler="ddim", steps=STEPS, guidance=GUIDANCE))
    ours = model.vae.decode(latents)[0] / 2 + 0.5
    del model
    baseline_images = {
        "from_pretrained": diffusers_image(StableDiffusionPipeline.from_pretrained, folder),
        "from_single_file": diffusers_image(StableDiffusionPipeline.from_single_file, file, config=str(folder)),
    }
    return {name: float((ours - image).abs().max()) for name, image in baseline_images.items()} | {"spread": float(ours.std())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary folder, deleted at the end)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fastsd-interchange-"))
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    imports = "import fastsd.commands.convert; from diffusers import AutoencoderKL; from transformers import CLIPTextModel"
    imports_only = run_python(imports)

    for factor in (0.18215, 0.13025):
        base, file, back = folder / f"base-{factor}", folder / f"{factor}.safetensors", folder / f"back-{factor}"
        for leftover in (file, back):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if not (base / "model_index.json").exists():
            make_base(base, factor)
        to_file = convert(base, file)
        to_folder = convert(file, back, "--tokenizer", base)
        result = {"to one file": to_file, "back": to_folder, "bits": equal(base, back), "names": known_names(file)}
        if factor == 0.18215:
            result["images"] = images(back, file)
        print(json.dumps(result, indent=1), flush=True)
        figures[f"factor {factor}"] = result

    figures["libraries alone, peak MB"] = imports_only["peak_mb"]
    figures["largest tensor, MB"] = round(49408 * 768 * 4 / 2**20)
    text = json.dumps({"stamp": stamp(torch.device("cpu")), "figures": figures}, indent=2)
    print(text)
    if arguments.json:
        replace_file(arguments.json, text + "\n")
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
