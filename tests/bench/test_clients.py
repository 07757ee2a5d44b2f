"""`bench/clients.py`: a program that reads our files rightly passes, and one that reads them wrongly does not."""

import json
import shutil
from pathlib import Path

import client_adapters
import clients
import pytest
from safetensors.torch import load_file, save_file

BY_NAME = {product.name: product for product in clients.PRODUCTS}
STAND_IN = clients.Client("stand-in", "fastsd", size="small", kind="folder", omitted=(("file", "is for others"),))


def in_process(client, job):
    """Load a product with fastsd, in this process."""
    values = client_adapters.fastsd(job)
    return values.pop("version"), values


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """The folder of all small products, and our values of them."""
    folder = tmp_path_factory.mktemp("clients")
    clients.make_products(folder, "small")
    return folder, clients.ours_of(folder, "small", run=in_process)


def verdicts(products, run=in_process, names=BY_NAME):
    folder, ours = products
    rows = clients.compare(STAND_IN, folder, ours, [BY_NAME[name] for name in names], run)
    return {(row["product"], row["quantity"]): row["verdict"] for row in rows}


def test_a_program_that_reads_our_files_passes(products):
    rows = verdicts(products)
    assert rows.pop(("file", "")) == "not run: is for others"
    assert set(rows.values()) == {"ok"} and len(rows) == 2 * 3 + 4 * 4


def twice(folder, job):
    """The program applies a LoRA at twice its strength."""
    path = folder / "twice.safetensors"
    tensors = load_file(job["lora"])
    save_file({name: tensor * (2 if "lora_up" in name else 1) for name, tensor in tensors.items()}, path)
    return {"lora": str(path)}


def without_text(folder, job):
    """The program ignores the text encoder's layers."""
    path = folder / "unet.safetensors"
    tensors = load_file(job["lora"])
    save_file(
        {name: tensor * (0 if name.startswith("lora_te") and "up" in name else 1) for name, tensor in tensors.items()}, path
    )
    return {"lora": str(path)}


def other_scale(folder, job):
    """The program assumes SD1.5's scaling factor."""
    shutil.copytree(job["folder"], folder / "scale", dirs_exist_ok=True)
    config = folder / "scale" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))
    return {"folder": str(folder / "scale")}


def as_epsilon(folder, job):
    """The program takes v-prediction to be epsilon."""
    return {"folder": str(Path(job["folder"]).with_name("plain"))}


WRONG = {
    twice: ("LoRA, alpha unlike rank", {"conditioning", "eps", "image", "LoRA strength"}),
    without_text: ("LoRA", {"conditioning", "image", "LoRA strength"}),
    other_scale: ("folder", {"image"}),
    as_epsilon: ("zero-SNR v-prediction", {"image"}),
}


@pytest.mark.parametrize("fault", WRONG, ids=lambda fault: fault.__name__)
def test_a_program_that_reads_them_wrongly_is_over(fault, products, tmp_path):
    name, quantities = WRONG[fault]

    def run(client, job):
        is_wrong = job == clients.job_of(BY_NAME[name], products[0], client)
        return in_process(client, job | (fault(tmp_path, job) if is_wrong else {}))

    rows = verdicts(products, run, dict.fromkeys(["folder", name]))
    assert {key for key, verdict in rows.items() if verdict == "OVER"} == {(name, quantity) for quantity in quantities}


def test_a_program_that_fails_is_named(products, tmp_path):
    """The interpreter of a program that is damaged or too old ends with an exit status and a message."""
    for status, verdict in ((1, "FAILED: exit status 1: no such layer"), (client_adapters.NOT_READ, "not run: no such layer")):
        python = tmp_path / f"python-{status}"
        python.write_text(f"#!/bin/sh\necho no such layer >&2\nexit {status}\n")
        python.chmod(0o755)
        program = clients.Client("old", "diffusers", str(python), size="small", kind="folder")
        rows = clients.compare(program, *products, [BY_NAME["folder"]])
        assert [row["verdict"] for row in rows] == [verdict]


def test_what_convert_warns_of_is_no_failure(products):
    folder, ours = products
    program = clients.Client("ComfyUI", "fastsd", size="small", kind="folder", omitted=STAND_IN.omitted)

    def run(client, job):
        return in_process(client, job | {"lora": ""})

    rows = clients.compare(program, folder, ours, [BY_NAME[name] for name in ("folder", "LoRA", "LoRA, PEFT names")], run)
    strengths = {row["product"]: row["verdict"] for row in rows if row["quantity"] == "LoRA strength"}
    assert strengths["LoRA, PEFT names"] == "over, as convert warns" and strengths["LoRA"] == "OVER"
