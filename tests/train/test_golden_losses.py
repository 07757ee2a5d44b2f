"""Losses and gradient norms of a few steps, as they were recorded: no change of the code may move them unnoticed.

`golden_losses.json` also says on which processor and PyTorch they were recorded. There, the bits are the same; elsewhere sums
are taken in another order. After a wanted change: `python tests/train/test_golden_losses.py`, and say in LOG.md what moved.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import make_tiny_model

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.train.precision import set_precision
from fastsd.train.step import Step

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 5
CASES = [(optimizer, precision) for optimizer in OPTIMIZERS for precision in ("fp32", "bf16")]
# Relative. bf16 has 8 bits of mantissa, and a sum in another order may flip the sign of one of Lion's updates.
TOLERANCE = {"fp32": 1e-6, "bf16": 2**-6}


def machine() -> dict[str, str]:
    """Describe what the order of sums depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    processor = " ".join(fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    return {"processor": processor, "isa": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__.split("+")[0]}


def losses(folder: Path, optimizer: str, precision: str) -> list[list[float]]:
    """Return the (loss, gradient norm) of each step."""
    model = load_model(ModelTable(base=str(folder)))
    stage = stage_of(precision=precision, micro_batch=2, grad_clip=1.0, **OPTIMIZERS[optimizer])
    set_precision(precision, model.unet)
    step = Step(model, stage, total=STEPS, seed=0)
    results = [step(batch, i) for i, batch in enumerate(batches(STEPS, 4))]
    return [[float(result.loss), float(result.grad_norm)] for result in results]


@pytest.mark.parametrize("optimizer, precision", CASES)
def test_losses_are_those_recorded(tiny_model, optimizer, precision):
    golden = json.loads(FILE.read_text())
    expected, actual = golden[f"{optimizer} {precision}"], losses(tiny_model, optimizer, precision)
    if golden["machine"] == machine():
        assert actual == expected
    else:
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=TOLERANCE[precision], atol=0)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        make_tiny_model(Path(root, "tiny"))
        golden = {
            f"{optimizer} {precision}": losses(Path(root, "tiny"), optimizer, precision) for optimizer, precision in CASES
        }
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target.write_text(json.dumps({"machine": machine(), **golden}, indent=1) + "\n")
