"""The kinds of faults. Each function yields one result per trial: "" if nothing was lost, otherwise the reason."""

import errno
import random
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from broken_restores import RESTORES
from jobs import EVERYTHING, JOBS, OLDER, Workshop
from lab import WRITES, Fault, Outcome, after, results
from power_loss import Call

Trials = Iterator[str]


def kills(shop: Workshop, count: int, rng: random.Random) -> Trials:
    """Kill a run at a random time or at any call, often again when it has started again, and let it end."""
    for i in range(count):
        name = list(JOBS)[i % len(JOBS)]
        reference = shop.reference(name)
        shop.restore(name)
        if i // len(JOBS) % 2:
            outcome = shop.start(name, during=after(rng.uniform(0, reference.seconds), signal.SIGKILL))
        else:
            calls = [number for number, call in enumerate(reference.calls, start=1) if not call.error]
            outcome = shop.start(name, fault=Fault(nth=rng.choice(calls), half=rng.random() < 0.5))
        if outcome.code == 0 or i % 3 == 0:  # the start of a finished run exports it again
            shop.start(name, fault=Fault(nth=rng.randint(1, 100)))
        reason = shop.ends_equal(name)
        yield reason and f"{name}: {reason}"


# Every kind of file that a command writes, also under its temporary name.
STEP = r"run/checkpoints/(\.tmp-)?step-[0-9]+"
FILES = {
    "weights of a checkpoint": rf"{STEP}/(unet|text_encoder)/.*\.safetensors",
    "state of a checkpoint": rf"{STEP}/state\.safetensors",
    "progress of a checkpoint": rf"{STEP}/state\.json",
    "config of a checkpoint": rf"{STEP}/run\.json",
    "manifest": rf"{STEP}/manifest\.json",
    "other files of a checkpoint": rf"{STEP}/(vae|tokenizer|scheduler|model_index).*",
    "folders of checkpoints": rf"run/checkpoints|{STEP}(/[a-z_]+)?",
    "log.jsonl": r"run/(\.tmp-)?log\.jsonl",
    "timing.jsonl": r"run/(\.tmp-)?timing\.jsonl",
    "validation.jsonl": r"run/(\.tmp-)?validation\.jsonl",
    "tensorboard": "run/tensorboard.*",
    "samples": "run/samples.*",
    "config.json": r"run/(\.tmp-)?config\.json",
    "images.json": r"run/(\.tmp-)?images\.json",
    "cost.json": r"run/(\.tmp-)?cost\.json",
    "snapshots": r"run/snapshots(/(\.tmp-)?step-[0-9]+\.safetensors)?",
    "lock": "run/lock",
    "model": r"run/(\.tmp-|\.tmp-old-)?model(/.*)?",
    "single file": r"run/(\.tmp-)?model\.safetensors",
    "model card": r"run/\.tmp-model/(README\.md|samples\.png|fastsd\.json)",
    "latents that a run reads": "data/cache/.*",
    "database of a cache": r"new-cache/cache\.sqlite.*",
    "shards of a cache": "new-cache/shards.*",
    "indexes of a cache": "new-cache/views.*",
    "locks of a cache": r"new-cache/.*lock",
    "leases of a machine": r"shared-cache/exchange/[^/]+/leases.*",
    "results of a machine": r"shared-cache/exchange/[^/]+/results.*",
    "beats of a machine": r"shared-cache/machines/[^/]+\.beat",
    "folder of a machine": r"shared-cache/machines/node-1.*",
    "output of sample": "drawn.*",
    "output of validate": r"(\.tmp-)?loss\.json",
    "output of convert": r"(\.tmp-)?converted\.safetensors",
    "output of compare": r"(\.tmp-)?report.*",
}
WRITERS = {
    "cache": "of a cache",
    "cache --machine": "of a machine",
    "sample": "of sample",
    "validate": "of validate",
    "convert": "of convert",
    "compare": "of compare",
}
NEEDS_ROOM = "create,write,resize,mkdir,link,rename"
ERRORS = {
    errno.ENOSPC: NEEDS_ROOM,
    errno.EDQUOT: NEEDS_ROOM,
    errno.EIO: f"{WRITES},read,open-to-read",
    errno.EROFS: "create,truncate,open,mkdir,link,rename,unlink,rmdir",
    errno.ENOLCK: "lock",
}
FOREVER = 1 << 30


def disk_errors(shop: Workshop, kind: str, count: int, rng: random.Random) -> Trials:
    """Let calls for one kind of file fail in `count` processes, with each error in turn. Later the disk works again."""
    name = next((command for command, text in WRITERS.items() if kind.endswith(text)), EVERYTHING)
    tried, killed, faults = 0, shop.killed(name), _faults_in(shop, name, kind)
    for i in range(5 * count if faults else 0):
        fault, calls = faults[i % len(faults)]
        start = killed if i < 4 * count and rng.random() < 0.3 else None  # how often it makes these calls is not known
        nth = rng.randint(1, 3 if start else calls)
        fault = replace(fault, nth=nth, times=rng.choice((1, 3, FOREVER)), half=rng.random() < 0.5)
        shop.restore(name, start)
        outcome = shop.start(name, fault=fault)
        if outcome.struck:
            tried += 1
            reason = outcome.problem(0, 2) or shop.ends_equal(name, besides=OLDER)
            yield reason and f"{kind}, {describe(fault)}: {reason}"
        if tried == count:
            return


def _faults_in(shop: Workshop, name: str, kind: str) -> list[tuple[Fault, int]]:
    """Return the errors that calls of a command for one kind of file can have, and the number of such calls."""
    faults = [Fault(names, FILES[kind], error=number) for number, names in ERRORS.items()]
    counts = [sum(_matches(call, fault) for call in shop.reference(name).calls) for fault in faults]
    recorded = [(fault, calls) for fault, calls in zip(faults, counts, strict=True) if calls]
    return recorded or [(fault, 3) for fault in faults if "read" in fault.calls]  # reads outside of the output are not recorded


def _matches(call: Call, fault: Fault) -> bool:
    paths = [path for path in (call.path, call.other) if path and re.fullmatch(fault.path, path)]
    return call.name in fault.calls.split(",") and bool(paths)


def describe(fault: Fault) -> str:
    times = {1: "once", FOREVER: "for good"}.get(fault.times, f"{fault.times} times")
    return f"{errno.errorcode[fault.error]} {times} from call {fault.nth}{' (half)' if fault.half else ''}"


IGNORED = (signal.SIGCHLD, signal.SIGCONT, signal.SIGWINCH, signal.SIGPIPE, signal.SIGTSTP)
FATAL = (signal.SIGQUIT, signal.SIGALRM)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REQUESTS = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*STOPS, *REQUESTS, *FATAL, *IGNORED)
COMMANDS = (EVERYTHING, *WRITERS)


def signals(shop: Workshop, name: str, number: signal.Signals, rng: random.Random) -> Trials:
    """Send a signal to a command at a random time, and run the command again."""
    seconds = rng.uniform(0, shop.reference(name).seconds)
    shop.restore(name)

    def send(pid: int) -> None:
        after(seconds, number)(pid)
        if number == signal.SIGTSTP:
            after(0.1, signal.SIGCONT)(pid)

    outcome = shop.start(name, during=send)
    codes = {0, 130} if number in STOPS else {0, -number} if number in FATAL else {0}
    if number in (*STOPS, *REQUESTS) and shop.is_complete(name):
        codes |= {-number}  # it came after the end
    reason = outcome.problem(*codes) or _steps_lost(shop.run, outcome) or shop.ends_equal(name, besides=OLDER)
    yield reason and f"{name}, {number.name}: {reason}"


def _steps_lost(run: Path, outcome: Outcome) -> str:
    """Return "" unless a run that stopped on request has logged a step that is in no checkpoint."""
    steps = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")]
    logged = (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0
    return (
        f"stopped after step {logged}, saved {max(steps, default=0)}"
        if outcome.code == 130 and logged > max(steps, default=0)
        else ""
    )


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[len(data) // 2] ^= 1
    with path.open("rb+") as file:
        file.write(data)


def overwrite(path: Path, block: bytes) -> None:
    with path.open("rb+") as file:
        file.write((block * (path.stat().st_size // len(block) + 1))[: path.stat().st_size])


# They damage the file itself, as a bad sector does, and with it all of its names.
DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "truncated": lambda path: path.open("rb+").truncate(path.stat().st_size // 2),
    "zeroed": lambda path: overwrite(path, b"\0"),
    "one bit": flip_bit,
    "garbage": lambda path: overwrite(path, b"\xff{]\n"),
}


# Files that nothing can rebuild, and what a model card takes from them. The restart has to name the logs.
LOGS = "log.jsonl", "timing.jsonl", "validation.jsonl"
CARD = r"model\.safetensors|model/(README\.md|fastsd\.json|samples\.png)"


def damages(shop: Workshop, stride: int, rng: random.Random) -> Trials:
    """Damage each `stride`-th file of a killed run, in each way, and start it again."""
    copy = shop.killed(EVERYTHING)
    files = sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
    trials = [(path, damage) for path in files for damage in DAMAGE]
    for path, damage in trials[rng.randrange(stride) :: stride]:
        shop.restore(EVERYTHING, copy)
        DAMAGE[damage](shop.run / path)
        is_log = path.name in LOGS
        reason = shop.ends_equal(EVERYTHING, besides=rf"{OLDER}|{CARD}|{path}" if is_log else OLDER)
        lost = is_log and results(shop.run).get(path.name) != shop.reference(EVERYTHING).results[path.name]
        if lost and path.name not in shop.last.text:
            reason = reason or "rows are lost in silence"
        yield reason and f"{path}, {damage}: {reason}"


CONTROLS = {
    "random position": "lion", "order": "lion", "scheduler": "lion", "EMA": "ema", "D-Lion's d": "two stages, state carried",
}  # fmt: skip
assert CONTROLS.keys() == RESTORES.keys() - {""}


def controls(shop: Workshop, names: Iterable[str] = CONTROLS) -> Trials:
    """Continue killed runs with restores that leave out one thing. Yield "" if the comparison notices it."""
    for broken in names:
        name = CONTROLS[broken]
        shop.restore(name, shop.killed(name, 0.5))
        outcome = shop.start(name, broken=broken)
        equal = results(shop.run) == shop.reference(name).results
        yield f"a restore without {broken} is not noticed" if equal or outcome.code else ""
