"""Predicted times: the parts of the model, cuDNN's workspace, and the tables that are committed."""

import json
import sys
from pathlib import Path

import pytest
from attention_rates import rates
from cudnn_workspace import load_cudnn
from kernel_times import Row
from predictions import END, README, RESULTS, START, reference_rows, rounded, table

from fastsd.plan import step_time
from fastsd.plan.operations import Operation
from fastsd.plan.step_time import step_seconds, workspace_bytes
from fastsd_kernels import TRITON
from fastsd_kernels.cards import CARDS

CARD = CARDS["4090"]
RATES = Path(step_time.__file__).with_name("attention_rates.json")


def product(rows: int, columns: int, inner: int, *, narrow: bool = True) -> Operation:
    sizes, flops = (1, rows, columns, inner), 2 * rows * columns * inner
    size = 2 if narrow else 4
    return Operation("matmul", "matmul", flops, size * (rows * inner + inner * columns + rows * columns), 1, narrow, sizes)


def share(operation: Operation, rate: float, precision: str = "bf16") -> tuple[float, float]:
    """Return the fastest and slowest predicted rate of a product, as a share of `rate` TFLOP/s."""
    fewest, most = step_seconds({operation: 1}, CARD, precision)
    return operation.flops / fewest / 1e12 / rate, operation.flops / most / 1e12 / rate


def test_products_reach_their_share_with_whole_waves_only():
    # 128 SMs, tiles of 256 x 128: two waves exactly.
    fastest, slowest = share(product(16 * 256, 16 * 128, 8192), CARD.bf16)
    assert 0.85 < fastest < 0.92 and 0.68 < slowest < 0.72
    # A tile more begins another wave, for which smaller tiles are better; and few tiles leave SMs idle, unless K is split.
    assert share(product(17 * 256, 16 * 128, 8192), CARD.bf16)[0] < 0.95 * fastest
    assert share(product(256, 128, 256), CARD.bf16)[0] < 1 / 16
    assert 0.05 < share(product(256, 128, 65536), CARD.bf16)[0] < 0.5
    # A row times a matrix reads the matrix.
    fewest, _ = step_seconds({product(1, 8192, 8192): 1}, CARD, "bf16")
    assert fewest == pytest.approx(2 * 8192 * 8192 / (CARD.copy * CARD.bandwidth * 1e9) + 1.5e-6, rel=1e-3)


def test_the_rate_of_a_product_is_that_of_its_precision():
    operation = product(16 * 256, 16 * 128, 8192, narrow=False)
    for precision, rate in (("fp32", CARD.fp32), ("tf32", CARD.tf32)):
        assert 0.85 < share(operation, rate, precision)[0] < 0.92


def test_a_pass_takes_the_time_of_its_bytes_and_launches():
    operation = Operation("pass", "GEGLU", 0, 10**9, 3, narrow=True)
    fewest, most = step_seconds({operation: 2}, CARD, "bf16")
    assert fewest == pytest.approx(2 * (1e9 / (0.92 * 1008e9) + 3 * 1.5e-6))
    assert most == pytest.approx(2 * (1e9 / (0.85 * 0.92 * 1008e9) + 3 * 3e-6))


def test_launches_of_attention_to_text_count_there():
    """Also those that add partial sums of dk and dv, and those of 64 queries."""

    def row(kernel: str, shape: str, count: int, us: float) -> Row:
        return Row("H200", "bf16", 8, "attention", kernel, shape, count, us + 2.5, us, "l2", 1, 1, 1, 0, 0, 0, 0, 0)

    rows = [row("forward", "8x64x8x160", 1, 10), row("backward_kv k v", "8x64x8x160", 1, 20)]
    text = [row("forward", "8x64x8x160 8x77x8x160", 1, 30), row("backward_kv k v", "8x64x8x160 8x77x8x160", 1, 40)]
    text.append(row("add_copies", "2x64x77x160 8x77x8x160", 2, 5))
    product = 2e-6 * 8 * 8 * 64 * 160
    expected = {"forward": 2 * 64 * product / 10, "backward": 5 * 64 * product / 20}
    expected |= {"forward, text": 2 * 77 * product / 30, "backward, text": 5 * 77 * product / 50}
    assert rates(rows + text)["bf16"]["H200"]["160"] == pytest.approx(expected, rel=0.01)


def test_attention_takes_its_predicted_rate_and_cards_without_one_that_of_the_nearest():
    flops, sizes = 10 * 64 * 4096**2 * 40, (64, 4096, 4096, 40)
    operation = Operation("attention", "attention backward", flops, 10**8, 3, narrow=True, sizes=sizes)
    rate = json.loads(RATES.read_text())["bf16"]["RTX 4090"]["40"]["backward"] * 1e12
    fewest, most = step_seconds({operation: 1}, CARD, "bf16")
    assert fewest == pytest.approx(operation.flops / (1.1 * rate) + 3 * 1.5e-6)
    assert most == pytest.approx(operation.flops / (0.9 * rate) + 3 * 3e-6)
    # Half the SMs or half the rate, twice the time; more memory changes nothing.
    for change in ({"sms": 64}, {"bf16": CARD.bf16 / 2}):
        half = CARD._replace(name="half of it", bandwidth=9000, **change)
        assert step_seconds({operation: 1}, half, "bf16")[0] == pytest.approx(2 * operation.flops / (1.1 * rate) + 3 * 1.5e-6)
    # On Hopper, published kernels are 1.2 to 2 times slower than predictions.
    fewest, most = step_seconds({operation: 1}, CARDS["H200"], "bf16")
    assert most / fewest == pytest.approx(0.83 / 0.5, rel=0.01)


def test_workspace_grows_with_images_and_belongs_to_a_card():
    # Winograd algorithms on a 4090, which a 5090 has none of.
    fp32 = [workspace_bytes("fp32", images, CARD) for images in (0.25, 1, 3, 4, 8, 32, 64, 128)]
    assert fp32 == sorted(fp32) and fp32[0] == fp32[1] > 400e6 and fp32[2] == fp32[3] and fp32[-1] == 2 * fp32[-2]
    assert workspace_bytes("fp32", 8, CARDS["5090"]) < 0.4 * workspace_bytes("fp32", 8, CARD)
    for precision in ("bf16", "tf32", "fp32"):
        by_card = [workspace_bytes(precision, 8, card) for card in CARDS.values()]
        assert workspace_bytes(precision, 8) == max(by_card)
    assert workspace_bytes("bf16", 32, CARD) < 100e6


def test_cudnn_is_asked_only_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(SystemExit, match="cudnn.*install the packages"):
        load_cudnn()


def test_readme_has_the_table_of_the_results():
    """`python bench/predictions.py --write` writes both."""
    text = README.read_text()
    assert text.split(START)[1].split(END)[0] == table(json.loads(RESULTS.read_text()))
    assert "predicted" in table(json.loads(RESULTS.read_text())).splitlines()[0]


@pytest.mark.slow
@pytest.mark.skipif(TRITON is None, reason="plans for a GPU need Triton's kernels")
def test_results_are_those_of_the_code():
    """After a change of the step's operations, run `python bench/predictions.py --write`."""
    rows = [row for row in json.loads(RESULTS.read_text())["reference job"] if row["precision"] == "bf16"]
    assert rounded(reference_rows(["bf16"])) == rows
