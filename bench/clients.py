"""Load what fastsd writes in the programs that people use it with, and compare their figures with our own.

    python bench/clients.py [--diffusers PYTHON ...] [--comfyui DIR [PYTHON]] [--sd-scripts DIR [PYTHON]] [--sd-cpp PYTHON]

Each program is an interpreter with its packages, or a checkout and the interpreter to run it with; nothing is downloaded. The
products are random models: a folder, a single file with a folded VAE, LoRAs with kohya's and diffusers' names, with alpha
unlike the rank and with convolutions, and a zero-SNR v-prediction model. For diffusers they are small. The other programs
recognise SD1.5 by its sizes, so for them they have full size: 11 GB of disk, 6 GB of memory, minutes for each program.

Each product is loaded in a process of its own by `client_adapters.py`, and compared with what fastsd computes from the same
weights: text embeddings, UNet output, one denoising step decoded to an image, and the strength of a LoRA. Exit status 1 means
that a difference is over its limit, where `fastsd convert` does not warn of it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from client_adapters import NOT_READ
from full_size import make_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsd.bench.counters import stamp
from fastsd.commands.convert import ConvertOptions, convert
from fastsd.config.schema import LoraTable, ModelTable
from fastsd.model.formats.load import load_model
from fastsd.model.formats.lora_weights import write_lora
from fastsd.model.latent_space import SD15_SCALING_FACTOR
from fastsd.model.lora import add_lora
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes
from fastsd.model.unet import UNetConfig
from fastsd.storage import TensorFile, replace_file
from fastsd.terminal.console import Console
from fastsd_kernels import noise

ADAPTERS = Path(__file__).with_name("client_adapters.py")
Values = dict[str, Tensor]
# Largest difference allowed, of embeddings and eps in standard deviations of ours, of images as a part of their range. fp16
# rounds the two convolutions that the VAE's scale is folded into. The strength is that of the LoRA's effect, less 1.
LIMITS = {"conditioning": 1e-3, "eps": 1e-3, "image": 1 / 255, "LoRA strength": 0.01}
LIMITS_OF_8_BITS = LIMITS | {"image": 3 / 255, "LoRA strength": 0.05}  # stable-diffusion.cpp also computes in fp16
EDGE = {"small": 16, "full": 16}  # side of the latents


PLAIN = LoraTable(rank=4, text_encoder=True, targets=["attention"])
CONV = LoraTable(rank=4, alpha=2.0, conv=2, text_encoder=True, targets=["attention", "feed_forward", "conv_shortcut"])
# LoRA files -> the settings with which fastsd loads them. In files with diffusers' names, alpha is the rank.
TABLES = {"lora": PLAIN, "alpha": PLAIN.model_copy(update={"alpha": 1.0}), "alpha-peft": PLAIN, "conv": CONV}


@dataclass(frozen=True)
class Product:
    """Files to load, and the model of ours that they must equal.

    Attributes:
        model: "plain" or "zero-snr", the model that is loaded, as a folder or as a file.
        kind: "folder" or "file"; "" = what the program usually loads.
        lora: the LoRA's file; "" = none. `reference` is the file with the same LoRA that fastsd loads.
    """

    name: str
    model: str = "plain"
    kind: str = ""
    lora: str = ""
    reference: str = ""


PRODUCTS = (
    Product("folder", kind="folder"),
    Product("file", kind="file"),
    Product("zero-SNR v-prediction", model="zero-snr"),
    Product("LoRA", lora="lora", reference="lora"),
    Product("LoRA, alpha unlike rank", lora="alpha", reference="alpha"),
    Product("LoRA, PEFT names", lora="alpha-peft", reference="alpha"),
    Product("LoRA with convolutions", lora="conv", reference="conv"),
)


@dataclass(frozen=True)
class Client:
    """A program to compare with.

    Attributes:
        adapter: its function in `client_adapters.py`.
        python: the interpreter that runs it, `checkout` its folder if it is not a package.
        omitted: products that the program does not claim to read, and why.
    """

    name: str
    adapter: str
    python: str = sys.executable
    checkout: str = ""
    size: str = "full"
    kind: str = "file"
    omitted: tuple[tuple[str, str], ...] = ()

    @property
    def limits(self) -> dict[str, float]:
        return LIMITS_OF_8_BITS if self.adapter == "sd_cpp" else LIMITS


FILES_ONLY = (("folder", "loads single files"),)
CLIENTS = {
    "diffusers": Client("diffusers", "diffusers", size="small", kind="folder"),
    "comfyui": Client("ComfyUI", "comfyui", omitted=FILES_ONLY),
    "sd_scripts": Client("sd-scripts", "sd_scripts", omitted=(*FILES_ONLY, ("LoRA, PEFT names", "reads kohya's names only"))),
    "sd_cpp": Client(
        "stable-diffusion.cpp", "sd_cpp", omitted=(*FILES_ONLY, ("zero-SNR v-prediction", "has no schedule with zero SNR"))
    ),
}


def is_warned(client: Client, product: Product) -> bool:
    """Return True if `fastsd convert` warns that this program reads the product wrongly."""
    return client.name in ("ComfyUI", "stable-diffusion.cpp") and product.lora.endswith("-peft")


def shapes_of(size: str) -> Shapes:
    """Return SD1.5's shapes, or those of a small model that diffusers also reads from a single file."""
    if size == "full":
        return Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    unet = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=64)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return Shapes(unet, SD15_TEXT | text | {"vocab_size": 1024}, SD15_VAE | blocks | {"block_out_channels": [32, 64]})


def make_products(folder: Path, size: str) -> None:
    """Write all products of a size, in fp16, with the commands that users have, and the inputs. LoRAs are in fp32."""
    quiet, half = Console(quiet=True), ConvertOptions(dtype="fp16")
    shapes = shapes_of(size)
    make_base(folder / "fp32", shapes=shapes)
    convert(str(folder / "fp32"), folder / "plain", options=half, console=quiet)
    shutil.rmtree(folder / "fp32")
    shutil.copytree(folder / "plain", folder / "v", copy_function=os.link)
    scheduler = folder / "v" / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.unlink()  # it is one file with that of the other folder
    scheduler.write_text(json.dumps(settings))
    convert(str(folder / "v"), folder / "zero-snr", console=quiet)
    shutil.rmtree(folder / "v")
    for name in ("plain", "zero-snr"):
        convert(str(folder / name), folder / f"{name}.safetensors", console=quiet)
    # As the model card says, the folder's configs are not those of the file, whose VAE has SD1.5's factor.
    shutil.copytree(folder / "plain", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    vae = folder / "config" / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": SD15_SCALING_FACTOR}))
    for name in dict.fromkeys(product.reference for product in PRODUCTS if product.reference):
        write_loras(folder, name)
    save_file(make_inputs(folder / "plain", shapes, EDGE[size]), folder / "inputs.safetensors")


def write_loras(folder: Path, lora: str) -> None:
    """Write a LoRA with kohya's and with diffusers' names. Its matrices are random."""
    model = load_model(ModelTable(base=str(folder / "plain")))
    add_lora(model, TABLES[lora], 0)
    generator = torch.Generator().manual_seed(1)
    for module in (model.unet, model.text.module):
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    write_lora(folder / f"{lora}.safetensors", model, names="kohya")
    write_lora(folder / f"{lora}-peft.safetensors", model, names="peft")


def make_inputs(folder: Path, shapes: Shapes, edge: int, seed: int = 42) -> Values:
    """Return the inputs of `client_adapters.py`. Programs with CLIP's tokenizer read the prompt "" as `empty_ids`."""
    size = shapes.text["vocab_size"]
    start, end = size - 2, size - 1  # as in CLIP's vocabulary
    tokens = [start, *range(300, 320), *[end] * 56]
    generator = torch.Generator().manual_seed(0)
    shape = (1, shapes.unet.in_channels, edge, edge)
    return {
        "ids": torch.tensor([tokens]),
        "empty_ids": torch.tensor([[start, *[end] * 76]]),
        "x": torch.randn(shape, generator=generator),
        "t": torch.tensor([500]),
        "context": torch.randn((1, 77, shapes.unet.cross_attention_dim), generator=generator),
        "noise": cuda_noise(seed, math.prod(shape)).view(shape),
    }


def cuda_noise(seed: int, count: int) -> Tensor:
    """Return the standard normals of PyTorch's generator on CUDA: Philox 4x32-10 with one counter for each number."""
    words = noise.philox(seed, 0, torch.arange(count) << 32, torch.zeros(1, dtype=torch.int64))[:, 0].double()
    radius = (-2 * ((words[:, 0] + 0.5) / 2**32).log()).sqrt()
    return (radius * (2 * math.pi * (words[:, 1] + 0.5) / 2**32).sin()).float()


def job_of(product: Product, folder: Path, client: Client, *, ours: bool = False) -> dict[str, Any]:
    """Return the job of an adapter for a product of the size that lies in `folder`."""
    lora = product.reference if ours else product.lora
    return {
        "folder": str(folder / product.model),
        "file": str(folder / f"{product.model}.safetensors"),
        "kind": product.kind or client.kind,
        "config": str(folder / "config"),
        "lora": str(folder / f"{lora}.safetensors") if lora else "",
        "lora_table": TABLES[lora].model_dump() if lora else None,
        "v_prediction": product.model == "zero-snr",
        "inputs": str(folder / "inputs.safetensors"),
        "checkout": client.checkout,
        "seed": 42,
        "pixels": 8 * EDGE[client.size],
    }


class AdapterFailed(Exception):
    """A program could not load a product. The message is the last line that it printed."""


class NotRead(Exception):
    """A program does not claim to read a product. The message is its reason."""


def run_adapter(client: Client, job: dict[str, Any]) -> tuple[str, Values]:
    """Run an adapter in the program's environment. Return the program's version and the tensors."""
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result = Path(scratch, "job.json"), Path(scratch, "result.safetensors")
        job_file.write_text(json.dumps(job))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if client.adapter != "fastsd":
            environment.pop("PYTHONPATH", None)
        command = [client.python, str(ADAPTERS), client.adapter, str(job_file), str(result)]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            lines = (process.stderr or process.stdout).strip().splitlines() or ["no message"]
            if process.returncode == NOT_READ:
                raise NotRead(lines[-1])
            raise AdapterFailed(f"exit status {process.returncode}: {lines[-1][:200]}")
        return TensorFile(result).metadata["version"], {name: t.clone() for name, t in load_file(result).items()}


def differences(ours: Values, result_values: Values, our_plain: Values | None, client_plain: Values | None) -> dict[str, float]:
    """Return the largest difference of each quantity that the program gives out.

    Args:
        our_plain, client_plain: the same without the LoRA, to measure its strength; None if the product has none.
    """
    result = {}
    for name, values in result_values.items():
        scale = 1.0 if name == "image" else ours[name].std().item()
        result[name] = (values - ours[name]).abs().max().item() / scale
    if our_plain is not None and client_plain is not None:
        effects = []
        for name in [name for name in ("conditioning", "eps") if name in result_values] or ["image"]:
            expected = (ours[name] - our_plain[name]).double()
            effects.append(((result_values[name] - client_plain[name]).double() * expected).sum() / expected.square().sum() - 1)
        result["LoRA strength"] = max((effect.item() for effect in effects), key=abs)
    return result


Run = Callable[[Client, dict[str, Any]], tuple[str, Values]]


def compare(
    client: Client, folder: Path, ours: dict[str, Values], products: Sequence[Product] = PRODUCTS, run: Run = run_adapter
) -> list[dict[str, Any]]:
    """Load products in a program. Return the rows of the table, one for each product and quantity."""
    rows: list[dict[str, Any]] = []
    plain, version = None, ""

    def add(product: Product, quantity: str, difference: float | None, verdict: str) -> None:
        row = {"client": client.name, "version": version, "product": product.name, "quantity": quantity}
        limit = client.limits.get(quantity)
        rows.append({**row, "difference": difference, "limit": limit if difference is not None else None, "verdict": verdict})
        print(as_text(rows[-1]), flush=True)

    for product in products:
        omitted = dict(client.omitted).get(product.name)
        if omitted:
            add(product, "", None, f"not run: {omitted}")
            continue
        try:
            version, result_values = run(client, job_of(product, folder, client))
        except (AdapterFailed, NotRead) as error:
            add(product, "", None, f"{'FAILED' if isinstance(error, AdapterFailed) else 'not run'}: {error}")
            continue
        if (product.kind or client.kind) == client.kind and not product.lora and product.model == "plain":
            plain = result_values
        our_plain = ours[products[0].name] if product.lora else None
        for quantity, difference in differences(ours[product.name], result_values, our_plain, plain).items():
            is_over = not abs(difference) <= client.limits[quantity]
            warned = is_warned(client, product)
            add(product, quantity, difference, ("over, as convert warns" if warned else "OVER") if is_over else "ok")
    return rows


def as_text(row: dict[str, Any]) -> str:
    difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
    limit = "" if row["limit"] is None else f"{row['limit']:.1e}"
    return " | ".join([row["client"], row["version"], row["product"], row["quantity"], difference, limit, row["verdict"]])


def ours_of(folder: Path, size: str, products: Sequence[Product] = PRODUCTS, run: Run = run_adapter) -> dict[str, Values]:
    """Return our values of the products. Those that stand for the same weights are computed once."""
    client = Client("fastsd", "fastsd", size=size)
    values: dict[tuple[str, str], Values] = {}
    for product in products:
        if (product.model, product.reference) not in values:
            values[product.model, product.reference] = run(client, job_of(product, folder, client, ours=True))[1]
    return {product.name: values[product.model, product.reference] for product in products}


def selected(arguments: argparse.Namespace) -> list[Client]:
    """Return the programs that the command line gives."""
    clients = []
    for key, client in CLIENTS.items():
        words = getattr(arguments, key)
        if client.adapter in ("diffusers", "sd_cpp"):
            clients += [Client(**{**vars(client), "python": python}) for python in words]
        elif words:
            python = words[1] if len(words) > 1 else sys.executable
            clients.append(Client(**{**vars(client), "python": python, "checkout": str(Path(words[0]).resolve())}))
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", nargs="+", metavar="PYTHON", default=[], help="interpreters that have diffusers")
    parser.add_argument("--comfyui", nargs="+", metavar=("DIR", "PYTHON"), default=[], help="a checkout of ComfyUI")
    parser.add_argument("--sd-scripts", nargs="+", metavar=("DIR", "PYTHON"), default=[], help="a checkout of sd-scripts")
    parser.add_argument("--sd-cpp", nargs=1, metavar="PYTHON", default=[], help="one that has stable-diffusion-cpp-python")
    names = [product.name for product in PRODUCTS[2:]]
    parser.add_argument("--products", nargs="+", choices=names, default=names, help="in addition to folder and file")
    parser.add_argument("--folder", type=Path, help="folder of the products, kept (default: a temporary one, deleted)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    clients = selected(arguments)
    products = [*PRODUCTS[:2], *(product for product in PRODUCTS if product.name in arguments.products)]
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fastsd-clients-"))
    rows = []
    try:
        for size in dict.fromkeys(client.size for client in clients):
            if not (folder / size / "inputs.safetensors").exists():
                # In a process of its own, so that its memory is free before a program starts.
                maker = multiprocessing.get_context("spawn").Process(target=make_products, args=(folder / size, size))
                maker.start()
                maker.join()
                if maker.exitcode:
                    sys.exit(f"the products of size {size} could not be written")
            ours = ours_of(folder / size, size, products)
            for client in clients:
                if client.size == size:
                    rows += compare(client, folder / size, ours, products)
    finally:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)
    missing = [client.name for client in CLIENTS.values() if client.name not in {row["client"] for row in rows}]
    for name in missing:
        print(f"{name}: not run")
    if arguments.json:
        table = {"stamp": stamp(torch.device("cpu")), "not run": missing, "rows": rows}
        replace_file(arguments.json, json.dumps(table, indent=1) + "\n")
    sys.exit(any(row["verdict"].startswith(("OVER", "FAILED")) for row in rows))


if __name__ == "__main__":
    main()
