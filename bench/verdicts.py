"""Format records of benchmarks as a table, and judge each goal. All functions are pure.

A record of a kernel holds one benchmark's figures from `measure.Bench.time`.  The implementation of our kernels begins with
"triton".  A goal for each shape is judged by the worst shape.  A goal for a whole step weights kinds by how often they occur in
it.  A goal is not met if a peer has a figure for a kind and our kernel has none.  It is open if it holds for the measured kinds
and some kinds were not measured.

A record of whole steps holds one candidate's figures from `steps.py`.  Ratios are between candidates timed in turn in one
process, and the worst ratio decides.  A goal in images per second is for the best setting on an H200.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastsd_kernels import workload

Record = dict[str, Any]
OURS = "triton"
# Kind -> pattern for the name of an operation, or of a kernel that no operation launched. The first match decides.
KINDS = {
    "attention": r"attention|flash|fmha",
    "optimizer": r"fastsd::(lion|dlion|adamw|square_sums|norm_of_sums)|optimizer|_foreach_|_fused_adam|vector_norm",
    "norms": r"norm(?!al)",
    "convolutions": r"conv(?!ert)|cudnn",
    "matmuls": r"mm\b|mmbackward|gemm|nvjet|::linear|::matmul",
    "other": r"::(sum|mean|embedding)",
    "elementwise, copies": r"aten::|fastsd::|mem(cpy|set)|elementwise",
}


class Verdict(NamedTuple):
    goal: str
    at_least: float
    figure: float | None
    met: bool | None  # None: something was not measured
    detail: str

    def line(self) -> str:
        figure = "not measured" if self.figure is None else f"{self.figure:.2f}"
        status = {True: "met", False: "NOT MET", None: "open"}[self.met]
        return f"{status:8} {figure:>12} (at least {self.at_least:.2f})  {self.goal}{': ' if self.detail else ''}{self.detail}"


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Judge every goal, including those without measurements."""
    timed = [r for r in records if "seconds" in r]
    return [*_attention(timed), *_group_norm(timed), *_optimizers(timed)]


def _attention(records: Sequence[Record]) -> list[Verdict]:
    attention, shapes = [r for r in records if r["op"] == "attention"], len(workload.ATTENTION)
    bf16 = _Ratios.of(attention, "bf16", ("bf16",), "sdpa", shapes)
    # The best fp32 of SDPA, including "math" with TF32.
    tf32 = _Ratios.of(attention, "tf32", ("ieee", "tf32"), "sdpa", shapes)
    return [
        bf16.worst("attention bf16, each shape over the best of SDPA", 1.0),
        bf16.mean("attention bf16 over the best of SDPA, geometric mean of shapes", 1.2, weighted=False),
        bf16.mean("attention bf16 over the best of SDPA, geometric mean by count", 1.2, weighted=True),
        tf32.worst("attention tf32, each shape over SDPA's best fp32", 2.0),
        tf32.mean("attention tf32 over SDPA's best fp32, geometric mean by count", 2.0, weighted=True),
    ]


def _group_norm(records: Sequence[Record]) -> list[Verdict]:
    goals, shapes = [], sum(kind.silu for kind in workload.GROUP_NORM)
    for mode in ("bf16", "fp32"):
        norms = [r for r in records if r["op"] == "group_norm+silu" and r["mode"] == mode]
        ours = [r for r in norms if r["implementation"] == OURS]
        ratios = _Ratios.of(norms, mode, (mode,), "pytorch", shapes)
        name = f"GroupNorm+SiLU {mode}"
        goals += [
            _step_share(f"{name}, a whole step, of copy bandwidth", 0.80, ours, shapes),
            _worst_share(f"{name}, each shape, of copy bandwidth", 0.80, ours, shapes),
            ratios.step(f"{name}, a whole step over PyTorch's", 3.0),
            ratios.worst(f"{name}, each shape over PyTorch's", 3.0),
        ]
    return goals


def _optimizers(records: Sequence[Record]) -> list[Verdict]:
    goals = []
    for op, name in (("lion", "Lion"), ("dlion", "D-Lion"), ("adamw", "AdamW")):
        for mode in ("fp32", "halves"):
            ours = [r for r in records if r["op"] == op and r["mode"] == mode and r["implementation"].startswith(OURS)]
            goals.append(_worst_share(f"{name} {mode}, of copy bandwidth", 0.85, ours, 2))
    dlion = _Ratios.of([r for r in records if r["op"] == "dlion"], "fp32", ("fp32",), "dadaptation", 1)
    return [*goals, dlion.worst("D-Lion fp32 over dadaptation's", 20.0)]


@dataclass(frozen=True)
class _Pair:
    """Times of our kernel and of the fastest peer for one kind."""

    kind: str
    count: int
    ours: float  # seconds
    peer_seconds: float
    peer: str

    @property
    def ratio(self) -> float:
        return self.peer_seconds / self.ours


class _Ratios(NamedTuple):
    pairs: list[_Pair]
    missing: list[str]  # kinds for which only a peer has a figure
    expected: int

    @classmethod
    def of(cls, records: Iterable[Record], mode: str, peer_modes: Sequence[str], peer: str, expected: int) -> _Ratios:
        """Compare the kernel in `mode` with the fastest implementation in `peer_modes` with a name that begins with `peer`."""
        ours: dict[str, Record] = {}
        best: dict[str, Record] = {}
        for r in records:
            if r["implementation"] == OURS and r["mode"] == mode:
                ours[r["kind"]] = r
            elif r["implementation"].startswith(peer) and r["mode"] in peer_modes:
                best[r["kind"]] = min(best.get(r["kind"], r), r, key=lambda x: x["seconds"])
        pairs = [
            _Pair(kind, r["count"], r["seconds"], best[kind]["seconds"], best[kind]["implementation"])
            for kind, r in ours.items()
            if kind in best
        ]
        return cls(pairs, [kind for kind in best if kind not in ours], expected)

    def worst(self, goal: str, at_least: float) -> Verdict:
        if not self.pairs:
            return self._verdict(goal, at_least, None, "")
        worst = min(self.pairs, key=lambda p: p.ratio)
        below = sum(p.ratio < at_least for p in self.pairs)
        return self._verdict(goal, at_least, worst.ratio, f"{worst.kind} over {worst.peer}; {below} of {len(self.pairs)} below")

    def mean(self, goal: str, at_least: float, *, weighted: bool) -> Verdict:
        """Judge the geometric mean."""
        weights = [p.count if weighted else 1 for p in self.pairs]
        logs = sum(w * math.log(p.ratio) for w, p in zip(weights, self.pairs, strict=True))
        return self._verdict(goal, at_least, math.exp(logs / sum(weights)) if weights else None, f"{len(weights)} shapes")

    def step(self, goal: str, at_least: float) -> Verdict:
        """Judge the ratio of the times of one step."""
        kernel_seconds = sum(p.count * p.ours for p in self.pairs)
        peer_seconds = sum(p.count * p.peer_seconds for p in self.pairs)
        return self._verdict(goal, at_least, peer_seconds / kernel_seconds if self.pairs else None, f"{len(self.pairs)} shapes")

    def _verdict(self, goal: str, at_least: float, figure: float | None, detail: str) -> Verdict:
        return _verdict(goal, at_least, figure, detail, self.expected - len(self.pairs), self.missing)


def _step_share(goal: str, at_least: float, ours: Sequence[Record], expected: int) -> Verdict:
    """Judge the bytes that a step must move, relative to the bytes that a copy moves in the same time."""
    if not ours:
        return _verdict(goal, at_least, None, "", expected)
    copy_bytes = sum(r["count"] * r["seconds"] * r["copy_gb_per_s"] * 1e9 for r in ours)
    share = sum(r["count"] * r["bytes"] for r in ours) / copy_bytes
    once = sum(r["count"] * (r["bytes_once"] or r["bytes"]) for r in ours) / copy_bytes
    return _verdict(goal, at_least, share, f"{len(ours)} shapes; {once:.2f} if each pass reads once", expected - len(ours))


def _worst_share(goal: str, at_least: float, ours: Sequence[Record], expected: int) -> Verdict:
    if not ours:
        return _verdict(goal, at_least, None, "", expected)
    worst = min(ours, key=lambda r: r["share_of_copy"])
    below = sum(r["share_of_copy"] < at_least for r in ours)
    detail = f"{worst['kind']}, {worst['implementation']}; {below} of {len(ours)} below"
    return _verdict(goal, at_least, worst["share_of_copy"], detail, expected - len(ours))


def _verdict(
    goal: str, at_least: float, figure: float | None, detail: str, unmeasured: int, missing: Sequence[str] = ()
) -> Verdict:
    if missing:
        return Verdict(goal, at_least, figure, False, f"no figure for {', '.join(missing)}; {detail}".rstrip("; "))
    if figure is None:
        return Verdict(goal, at_least, None, None, "")
    if figure < at_least:
        return Verdict(goal, at_least, figure, False, detail)
    detail += f"; {unmeasured} not measured" if unmeasured else ""
    return Verdict(goal, at_least, figure, None if unmeasured else True, detail)


def table(records: Sequence[Record]) -> list[str]:
    """Return a header and a line per record. `x` is the time relative to our kernel for the same op, kind and mode."""
    ours = {(r["op"], r["kind"], r["mode"]): r["seconds"] for r in records if r["implementation"] == OURS and "seconds" in r}
    lines = [
        f"{'op':20} {'kind':16} {'n':>3} {'mode':7} {'implementation':22} {'timed':6}"
        f" {'ms':>9} {'GB/s':>6} {'of copy':>7} {'TFLOP/s':>7} {'of mm':>6} {'x':>6}"
    ]
    for r in records:
        labels = f"{r['op']:20} {r['kind']:16} {r['count']:3} {r['mode']:7} {r['implementation']:22} {r['timed']:6}"
        if "seconds" not in r:
            lines.append(f"{labels} {'-':>9}")
            continue
        kernel_seconds = ours.get((r["op"], r["kind"], r["mode"]))
        flops = f"{r['tflop_per_s']:7.1f} {r['share_of_matmul']:6.0%}" if "tflop_per_s" in r else f"{'':14}"
        ratio = f"{r['seconds'] / kernel_seconds:6.2f}" if kernel_seconds else ""
        copy = f"{r['gb_per_s']:6.0f} {r['share_of_copy']:7.0%}"
        lines.append(f"{labels} {1e3 * r['seconds']:9.4f} {copy} {flops} {ratio}".rstrip())
    return lines


def step_verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Judge every goal of whole steps. Records of a tiny model are ignored."""
    real = [r for r in records if not r["small"]]
    ours = [r for r in real if r["op"] == "step" and r["implementation"] == "fastsd"]
    # A step with a graph is one launch for the host, so steps without a graph are included.
    steady = [r for r in real if r["op"] in ("step", "graph") and r["implementation"] in ("fastsd", "graph", "no graph")]
    waits = max((sum(r["host_waits"].values()) for r in steady), default=0)
    free = sum(not r["host_waits"] for r in steady) / len(steady) if steady else None
    return [
        _fastest(ours, "bf16", 150.0, " (the aim is 200)"),
        _over_peer(real, "bf16", "diffusers", 2.0),
        _over_peer(real, "bf16", "compiled", 1.3),
        _fastest(ours, "tf32", 110.0, ""),
        _over_peer(real, "fp32", "diffusers", 1.3),
        _verdict("share of settings whose steady step never makes the host wait", 1.0, free, f"at most {waits} waits", 0),
        _most_images(real, "fp32", "dlion", 8),
        _most_images(real, "bf16", "lion", 32),
        _plan(real),
    ]


def _fastest(ours: Sequence[Record], mode: str, at_least: float, aim: str) -> Verdict:
    goal = f"{mode}, 512 px, images a second on an H200{aim}"
    best = max((r for r in ours if r["mode"] == mode), key=lambda r: r["img_per_s"], default=None)
    if best is None:
        return Verdict(goal, at_least, None, None, "")
    if "H200" not in best["device"]:
        return Verdict(goal, at_least, best["img_per_s"], None, f"{best['kind']}, measured on {best['device']}")
    return _verdict(goal, at_least, best["img_per_s"], f"{best['kind']}, MFU {best['mfu']:.0%}", 0)


def _over_peer(records: Sequence[Record], mode: str, peer: str, at_least: float) -> Verdict:
    """Judge our speed relative to a peer. Both use AdamW."""
    goal = f"{mode}, 512 px, whole steps over {peer}"
    steps = [r for r in records if r["op"] == "step" and (r["mode"], r["implementation"]) == (mode, peer)]
    if not steps:
        notes = [note for r in records if r["mode"] == mode for note in r.get("notes", []) if peer in note]
        return Verdict(goal, at_least, None, None, notes[0] if notes else "")
    worst = min(steps, key=lambda r: r["times"])
    below = sum(r["times"] < at_least for r in steps)
    return _verdict(goal, at_least, worst["times"], f"{worst['kind']}; {below} of {len(steps)} below", 0)


def _most_images(records: Sequence[Record], mode: str, optimizer: str, at_least: int) -> Verdict:
    matches = [r for r in records if r["op"] == "micro-batch" and r["mode"] == mode and r["optimizer"] == optimizer]
    ours = {r["checkpointing"]: r["images"] for r in matches if r["implementation"] == "fastsd"}
    details = [f"{images} with {level}" for level, images in ours.items()]
    details += [f"{r['images']} by {r['implementation']}" for r in matches if r["implementation"] != "fastsd"]
    goal = f"{mode}, {optimizer}, images a forward in 24 GB"
    return _verdict(goal, at_least, max(ours.values(), default=None), ", ".join(details), 0)


def _plan(records: Sequence[Record]) -> Verdict:
    goal = "peak of a step as planned, 1 less the share it is off by"
    plans = [r for r in records if r["op"] == "plan"]
    if not plans:
        return Verdict(goal, 0.93, None, None, "")
    worst = max(plans, key=lambda r: abs(r["ratio"] - 1))
    detail = f"{worst['mode']}, {worst['kind']}: planned / measured {worst['ratio']:.3f}; {len(plans)} combinations"
    return _verdict(goal, 0.93, 1 - abs(worst["ratio"] - 1), detail, max(0, 6 - len(plans)))


def time_by_kind(rows: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    """Return milliseconds and their share by kind, largest first. A row is (operation or "", kernel or "", milliseconds)."""
    ms_by_kind: dict[str, float] = defaultdict(float)
    for operation, kernel, ms in rows:
        name = operation or kernel
        matches = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        ms_by_kind[next(matches, "other")] += ms
    total = sum(ms_by_kind.values()) or 1.0
    return {kind: {"ms": ms, "share": ms / total} for kind, ms in sorted(ms_by_kind.items(), key=lambda item: -item[1])}


def step_table(records: Sequence[Record]) -> list[str]:
    """Return a line per record, and lines for its notes. `x` is a step's time relative to ours in the same process."""
    lines = []
    for r in records:
        lines.append(f"{r['op']:11} {r['mode']:4} {r['kind']:36} {r['implementation']:12} {_figures(r)}")
        lines += [f"    {note}" for note in r.get("notes", [])]
    return lines


def _figures(r: Record) -> str:
    if r["op"] == "micro-batch":
        planned = f", {r['planned']} planned" if "planned" in r else ""
        return f"{r['images']} images per forward{planned}; peak {r['peak_gb']:.1f} GB, {r['reserved_gb']:.1f} GB reserved"
    if r["op"] == "plan":
        peaks = f"planned {r['planned_gb']:.2f} GB, measured {r['peak_gb']:.2f}: {r['ratio']:.3f}"
        return f"{peaks}; reserved {r['reserved_gb']:.2f}"
    if r["op"] == "profile":
        kinds = ", ".join(f"{kind} {row['ms']:.1f} ms ({row['share']:.0%})" for kind, row in r["kinds"].items())
        return f"{r['step_ms']:.1f} ms: {kinds}"
    waits = "-" if r["host_waits"] is None else sum(r["host_waits"].values())
    peak = "-" if r["peak_gb"] is None else f"{r['peak_gb']:.1f}"
    speed = f"{r['img_per_s']:7.1f} img/s {r['ms']['median']:8.1f} ms {r['mfu']:4.0%} MFU"
    return f"{speed} {peak:>6} GB {r['launches'] or '-':>6} launches {waits:>4} waits {r['times']:6.2f} x"
