"""Predictions of kernels' times: each part on small inputs with results by hand, and whole ones in a new process."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from kernel_times import print_sums, signature, step_launches, sums

from fastsd_kernels import workload
from fastsd_kernels.attention_tiles import needed_flops
from fastsd_kernels.cards import CARDS, MULTIPROCESSORS
from fastsd_kernels.launch import ARCHITECTURES, Launch, meta
from fastsd_kernels.prediction import LAUNCH_US, Kernel, blocks_per_sm, predict
from fastsd_kernels.replay import cost, replay
from fastsd_kernels.sass import Code, Compiled, Instruction, decode
from fastsd_kernels.ttir import Loop, Work, evaluate
from fastsd_kernels.warp_path import Flow

LISTING = """
        /*1320*/                   LDSM.16.M88.4 R36, [R86] ;              /* 0x000000005624783b */
                                                                           /* 0x000fe80000000200 */
        /*1330*/                   LDSM.16.M88.4 R60, [R94+0x2000] ;       /* 0x002000005e3c783b */
                                                                           /* 0x000e680000000200 */
        /*1340*/              @!P4 BRA 0x1320 ;                            /* 0xffffffd000048947 */
                                                                           /* 0x002fea000383ffff */
"""
TTIR = """
module {
  tt.func public @walk(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x"), %n: i32 loc("n")) attributes {} {
    %zero = arith.constant 0 : i32 loc(#loc)
    %c32 = arith.constant 32 : i32
    %c4 = arith.constant 4 : i32
    %c100 = arith.constant 100 : i32
    %pid = tt.get_program_id x : i32
    %first = arith.muli %pid, %c100 : i32
    %last = arith.addi %first, %c100 : i32
    %stop = arith.minsi %last, %n : i32
    %acc = scf.for %i = %first to %stop step %c32 iter_args(%a = %zero) -> (i32)  : i32 {
      %p = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>>
      %v = tt.load %p : tensor<32x!tt.ptr<f32>>
      %inner = scf.for %j = %zero to %c32 step %c4 iter_args(%b = %a) -> (i32)  : i32 {
        %d = tt.dot %l, %r, %s, inputPrecision = tf32 : tensor<16x8xf32> * tensor<8x32xf32> -> tensor<16x32xf32>
        scf.yield %b : i32
      }
      scf.yield %inner : i32
    }
    %whole = arith.cmpi sle, %last, %n : i32
    %r:1 = scf.if %whole -> (i32) {
      %w = scf.while (%at = %first) : (i32) -> (i32) {
        %more = arith.cmpi slt, %at, %last : i32
        scf.condition(%more) %at : i32
      } do {
        %next = arith.addi %at, %c4 : i32
        scf.yield %next : i32
      }
      scf.yield %w : i32
    } else {
      %w = scf.while (%at = %first) : (i32) -> (i32) {
        %more = arith.cmpi slt, %at, %n : i32
        scf.condition(%more) %at : i32
      } do {
        %next = arith.addi %at, %c4 : i32
        scf.yield %next : i32
      }
      scf.yield %w : i32
    }
    %q = tt.addptr %x_ptr, %pid : !tt.ptr<f32>, i32
    tt.store %q, %zero : !tt.ptr<f32>
    tt.return
  }
}
"""


def launch_of(*arguments, grid=(10,), names=("x_ptr", "n")):
    return Launch(SimpleNamespace(params=[SimpleNamespace(name=name) for name in names]), grid, arguments, {})


def code(*lines):
    """Return instructions from "name operands", "@P0 BRA 2" (a branch to the third), with a stall of 2 and no scoreboards."""
    instructions = []
    for i, line in enumerate(lines):
        words = line.split()
        guard = words.pop(0) if words[0].startswith("@") else ""
        jumps = words[0] in ("BRA", "CALL")
        target = 16 * int(words[1]) if jumps else None
        instructions.append(Instruction(16 * i, words[0], " ".join(words[1:]), guard, 2, 7, 7, 0, target))
    return instructions


def kernel_of(instructions, loops=(), registers=32, shared=0, warps=4, work=None):
    counts = Code(registers, 0, shared, {}, 0, 0, 0, 0, 0, 0)
    return Kernel(Compiled(counts, instructions, "", warps), work or Work(list(loops), 1024, 1024, 2048, 0))


def test_decode_reads_the_control_bits():
    first, second, branch = decode(LISTING)
    assert (first.name, first.operands.strip(), first.stall, first.sets, first.frees) == (
        "LDSM.16.M88.4",
        "R36, [R86]",
        4,
        7,
        7,
    )
    assert (second.stall, second.sets, second.frees, second.waits) == (4, 1, 7, 0)
    assert (branch.guard, branch.target, branch.waits, branch.opcode) == ("@!P4", 0x1320, 2, "BRA")


def test_every_card_has_an_architecture_with_tiles():
    assert set(MULTIPROCESSORS) == set(ARCHITECTURES) == {card.sm for card in CARDS.values()}
    for card in CARDS.values():
        assert card.tf32 < card.bf16 <= card.sms * card.tensor * card.ghz * 1.2 / 1e3, card.name


@pytest.mark.parametrize(
    "card, registers, shared, warps, blocks",
    [
        ("4090", 128, 0, 8, 2),  # 65536 / (128 * 32) = 16 warps
        ("4090", 168, 0, 4, 3),  # 12.2 warps
        ("4090", 129, 0, 4, 3),  # registers in eights: 136, 15.06 warps, in fours 12
        ("4090", 32, 49 * 1024, 4, 2),  # with 1 KB each, two fill 100 KB
        ("4090", 32, 50 * 1024, 4, 1),
        ("4090", 32, 0, 1, 24),  # blocks
        ("3090", 32, 0, 1, 16),
        ("4090", 32, 0, 16, 3),  # warps: 48
        ("A100", 32, 0, 16, 4),  # warps: 64
        ("4090", 32, 100 * 1024, 4, 0),
    ],
)
def test_blocks_per_sm(card, registers, shared, warps, blocks):
    assert blocks_per_sm(CARDS[card], Code(registers, 0, shared, {}, 0, 0, 0, 0, 0, 0), warps) == blocks


def test_loops_bytes_and_products_come_from_the_source():
    # Program 4 of 10 walks 400 to 500, in tiles of 32, and all of it lies within n.
    work = evaluate(TTIR, launch_of(meta(1000), 1000))
    inner = Loop(8, True, [])
    assert work.loops == [Loop(4, False, [inner]), Loop(25, True, []), Loop(0, False, [])]
    assert (work.loaded, work.stored, work.device) == (10 * 4 * 32 * 4, 10 * 4, 2 * 4000)  # x is read and written
    assert work.flops == 10 * 4 * 8 * 2 * 16 * 8 * 32
    # 450 is the end: two tiles, and the other branch with a loop that depends on n.
    assert [loop.turns for loop in evaluate(TTIR, launch_of(meta(1000), 450)).loops] == [2, 0, 13]


def test_a_loop_over_data_is_an_error():
    text = TTIR.replace("%stop = arith.minsi %last, %n : i32", "%stop = tt.load %x_ptr : !tt.ptr<i32>")
    with pytest.raises(ValueError, match="depend on data"):
        evaluate(text, launch_of(meta(1000), 1000))


def test_a_warp_takes_the_turns_of_its_loops():
    instructions = code("MOV", "LDG", "FFMA", "FADD", "@P0 BRA 2", "@P1 BRA 1", "STG", "EXIT", "BRA 8")
    flow = Flow(instructions, [Loop(5, False, [Loop(3, False, [])])])
    assert [flow.executed()[i] for i in range(9)] == [1, 5, 15, 15, 15, 5, 1, 1, 0]
    limits = {region.header: 2 for region in flow.outermost}
    assert flow.path(limits).count(1) == 2 and flow.path(limits).count(2) == 6


def test_loops_that_are_left_in_the_middle():
    # The assembler writes "@P0 CALL" for a branch out of the loop; real subroutines return.
    instructions = code("MOV", "FFMA", "@P0 CALL 5", "LDS", "BRA 1", "STG", "EXIT")
    assert Flow(instructions, [Loop(4, False, [])]).path({}) == [0, *[1, 2, 3, 4] * 3, 1, 2, 5, 6]
    instructions = code("MOV", "@P0 BRA 3", "CALL 5", "STG", "EXIT", "MUFU", "RET")
    assert Flow(instructions, []).path({}) == [0, 1, 3, 4]  # around the subroutine for rare numbers


def test_loops_that_end_with_the_program():
    instructions = code("MOV", "FFMA", "LDS", "@P1 BRA 2", "STG", "@P0 EXIT", "MUFU", "BRA 1")
    flow = Flow(instructions, [Loop(3, False, [Loop(2, False, [])])])
    assert flow.path({}) == [0, *[1, 2, 3, 2, 3, 4, 5, 6, 7] * 2, 1, 2, 3, 2, 3, 4, 5]


def test_branches_lead_to_whole_tiles():
    # Tiles with masks move as many bytes in more instructions; the other branch skips the tile.
    instructions = code("@P0 BRA 7", "@P1 BRA 5", "LDG.E.128", "STG.E.128", "BRA 7", *["LDG.E"] * 2, "EXIT")
    assert Flow(instructions, []).path({}) == [0, 1, 2, 3, 4, 7]
    masked = code("@P1 BRA 3", "LDG.E.128", "BRA 8", *["LDG.E"] * 4, "MOV", "EXIT")
    assert Flow(masked, []).path({}) == [0, 1, 2, 8]


def test_loops_that_cannot_be_matched_are_an_error():
    instructions = code("MOV", "FFMA", "@P0 BRA 1", "EXIT")
    with pytest.raises(ValueError, match="1 loops of the machine code, 0 of the source"):
        Flow(instructions, [])
    with pytest.raises(ValueError, match="1 loops of the machine code, 2 of the source"):
        Flow(instructions, [Loop(2, False, []), Loop(3, False, [])])
    # The compiler unrolls what it knows.
    assert Flow(instructions, [Loop(2, True, []), Loop(3, False, [])]).executed()[1] == 3


def test_replay_of_one_scheduler():
    card, ffma, mma = CARDS["4090"], code(*["FFMA"] * 100), code(*["HMMA.16816.F32.BF16"] * 100)
    path, stall = range(100), 2
    assert replay(card, ffma, path, 1, 1, 500) == 100 * stall
    assert 200 <= replay(card, ffma, path, 2, 1, 500) <= 300  # the second warp uses the cycles in between
    # 16 x 8 x 16 multiply-adds at 512 / 4 FLOP a clock: 32 cycles, and twice with TF32 and half the contraction the same.
    assert cost(card, mma[0]).cycles == 32 == cost(card, code("HMMA.1688.F32.TF32")[0]).cycles
    assert cost(CARDS["H200"], code("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24")[0]).cycles == 64
    for warps in (1, 4):
        assert 3200 * warps <= replay(card, mma, path, warps, 1, 500) < 3200 * warps + 100
    load = code("LDG.E", "FFMA")
    waits = [load[0]._replace(sets=0), load[1]._replace(waits=1)]
    assert replay(card, waits, range(2), 1, 1, 500) == 4 + 500 + stall
    assert replay(card, load, range(2), 1, 1, 500) < 600


def test_barriers_and_copies():
    card = CARDS["4090"]
    slow = code("FFMA", "BAR.SYNC", "FFMA")
    alone, both = replay(card, slow, range(3), 1, 1, 500), replay(card, slow, range(3), 2, 2, 500)
    assert both > alone  # the first warp waits for the second
    groups = code("LDGSTS.E", "LDGDEPBAR", "LDGSTS.E", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "FFMA")
    one_left = replay(card, groups, range(6), 1, 1, 500)
    none_left = replay(card, [*groups[:4], groups[4]._replace(operands="SB0, 0x0"), groups[5]], range(6), 1, 1, 500)
    assert 500 < one_left <= none_left


def test_time_grows_with_the_work():
    instructions = code("MOV", "LDS.128", *["FFMA"] * 64, "@P0 BRA 1", "EXIT")
    card = CARDS["4090"]

    def us(programs, turns, **properties):
        kernel = kernel_of(instructions, [Loop(turns, False, [])], **properties)
        return predict(card, kernel, Launch(None, (programs,), (), {}), Work([], 1024, 1024, 2048, 0))

    assert us(128, 100).us < us(128, 200).us < us(12800, 200).us
    # A replayed loop is extrapolated: twice the turns, twice the time.
    assert (us(12800, 2000).us - LAUNCH_US) / (us(12800, 1000).us - LAUNCH_US) == pytest.approx(2, rel=0.02)
    assert us(128, 100).blocks == 1 and us(12800, 100).blocks == 12 and us(12800, 100).waves == pytest.approx(100 / 12)
    few = us(12800, 200, registers=255)
    assert few.blocks == 2 and few.us > us(12800, 200).us
    assert us(12800, 2000).busiest == "issue" and us(12800, 2000).floor_us <= us(12800, 2000).us
    assert us(12800, 200).per_load == 64 / 4


def test_memory_bound_launches_take_their_bytes():
    for name, card in CARDS.items():
        work = Work([], 10**9, 10**9, 2 * 10**9, 0)
        kernel = kernel_of(code("LDG.E.128", "STG.E.128", "EXIT"), work=work)
        p = predict(card, kernel, Launch(None, (1000,), (), {}), work)
        assert p.us - LAUNCH_US == pytest.approx(2e9 / (card.bandwidth * card.copy * 1e3), rel=0.01), name
        assert p.busiest == "device" and p.shares["device"] == pytest.approx(1, abs=0.01)


def test_needed_flops_count_products_without_padding():
    q, k = meta(2, 4096, 8, 40), meta(2, 77, 8, 40)
    product = 2 * 2 * 8 * 4096 * 77 * 40
    launch = launch_of(q, k, k, q, names=("q_ptr", "k_ptr", "v_ptr", "o_ptr"))
    assert needed_flops(launch) == 2 * product == 2 * workload.Attention(4096, 77, 8, 40).flops
    backward = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr")
    assert needed_flops(launch_of(q, k, k, q, q, q, names=backward)) == 3 * product
    assert needed_flops(launch_of(q, q, names=("sums_ptr", "dq_ptr"))) == 0
    assert needed_flops(launch, 64) == needed_flops(launch)
    assert needed_flops(launch._replace(options={"PRECISION": "fp16x3"})) == 3 * needed_flops(launch)
    keys = launch_of(q, k, k, q, k, k, names=("q_ptr", "k_ptr", "v_ptr", "do_ptr", "dk_ptr", "dv_ptr"))
    for with_k, with_v, products in ((True, True, 4), (True, False, 3), (False, True, 2)):
        chosen = keys._replace(options={"WITH_K": with_k, "WITH_V": with_v})
        assert needed_flops(chosen) == products * product
        assert needed_flops(chosen, 64) == products * product // 77 * 128


def test_steps_are_those_of_the_model(capsys):
    launches = step_launches(89, "bf16", 2)
    forwards = [x for x in launches if x.kernel.__name__ == "_forward" and "attention" in x.kernel.fn.__module__]
    kinds = Counter((x.arguments[0].shape[1], x.arguments[1].shape[1], 8, x.arguments[0].shape[3]) for x in forwards)
    assert kinds == {tuple(kind): count for kind, count in workload.ATTENTION.items()}
    assert all(x.arguments[0].shape[0] == 2 and x.arguments[0].dtype == torch.bfloat16 for x in forwards)
    # q, k and v are views of a projection, so that strides are the step's.
    assert any(x.arguments[0].stride(1) == 3 * 8 * 40 for x in forwards)
    assert len(set(map(signature, forwards))) == len(kinds)
    row = SimpleNamespace(card="4090", precision="bf16", batch=2, op="attention", kernel="forward", count=5, us=200.0)
    table = sums([row, SimpleNamespace(**{**vars(row), "us": 100.0})])
    assert table == {"4090": {"bf16": {"2": {"attention forward": 1.5}}}}
    print_sums(table, {"4090": {"bf16": {"2": {"attention forward": 3.0}}}})
    assert "attention 3.00 -> 1.50, all 3.00 -> 1.50" in capsys.readouterr().out
