"""Real processes of fastsd in which a chosen call to the file system fails, and the comparison of what they leave.

shim.c            makes calls fail; it is compiled here and preloaded
fork_server.py    starts a process in milliseconds
jobs.py           the commands that are disturbed
kinds.py          kinds of faults: kills, failing disks, signals, damaged files, broken restores
power_cuts.py     power cuts; power_loss.py has the disks that they leave
table.py          the table: tried, survived, and the reasons; test_faults.py tries a sample
soak.py           many steps in one process: memory, files, threads
"""

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WRITES = "create,truncate,open,write,resize,mkdir,link,rename,unlink,rmdir,fsync"  # calls that change the disk
SECONDS = 300  # the longest that a process may take


@dataclass(frozen=True)
class Fault:
    """Calls that fail, see `shim.c`. `error = 0` kills the process, and `path` is a regular expression."""

    calls: str = WRITES
    path: str = ".*"
    nth: int = 1
    times: int = 1
    error: int = 0
    half: bool = False

    def environment(self) -> dict[str, str]:
        return {
            "FAULT_CALLS": self.calls, "FAULT_PATH": self.path, "FAULT_NTH": str(self.nth), "FAULT_TIMES": str(self.times),
            "FAULT_ERROR": str(self.error), "FAULT_HALF": str(int(self.half)),
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The end of a process: its exit code, or minus the signal that ended it, and all that it printed.

    `struck` is True if a call has failed on purpose.
    """

    code: int
    text: str
    struck: bool

    @property
    def last_line(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]

    def problem(self, *codes: int) -> str:
        """Return "" if the process ended with one of the codes and without a traceback, otherwise a description."""
        if "Traceback" in self.text:
            return f"traceback: {self.last_line}"
        return "" if self.code in codes else f"exit code {self.code}: {self.last_line}"


class Lab:
    """Starts commands in one folder, `root`. Only calls below it fail."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        library = root.with_name(f"{root.name}-shim.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl", "-lpthread"], check=True)
        paths = [ROOT, ROOT / "kernels", ROOT / "tests/support", HERE]
        environment = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._output, self._sign = (root.with_name(f"{root.name}-{name}") for name in ("output", "sign"))
        words, pipe = [sys.executable, HERE / "fork_server.py"], subprocess.PIPE
        self._server = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=os.environ | environment, cwd=root)

    def close(self) -> None:
        self._server.communicate()

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(
        self,
        *words: object,
        fault: Fault | None = None,
        trace: Path | None = None,
        broken: str = "",
        during: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Run `fastsd WORDS` to its end.

        Args:
            fault: calls that fail.
            trace: file in which every call below `root` is recorded.
            broken: name in `broken_restores.RESTORES`.
            during: called with the id of the running process.
        """
        self._output.write_text("")
        self._sign.unlink(missing_ok=True)
        environment = {"FAULT_ROOT": str(self.root)} | (fault.environment() if fault else {"FAULT_NTH": "0"})
        environment |= {"FAULT_TRACE": str(trace or ""), "FAULT_SIGN": str(self._sign)}
        command = {"words": list(map(str, words)), "output": str(self._output), "environment": environment, "patch": broken}
        assert self._server.stdin and self._server.stdout
        print(json.dumps(command), file=self._server.stdin, flush=True)
        pid = int(self._server.stdout.readline())
        if during:
            during(pid)
        if not select.select([self._server.stdout], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        code = int(self._server.stdout.readline())
        return Outcome(code, self._output.read_text(errors="replace"), self._sign.exists())


def after(seconds: float, number: int) -> Callable[[int], None]:
    """Return a function that sends a signal to a process after some seconds."""

    def send(pid: int) -> None:
        time.sleep(0.01 + seconds)  # before that, a signal would meet the start of Python
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(pid, number)

    return send


DATES = re.compile(rb"20\d\d-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?")
# Also the digests of logs in state.json, because the logs themselves are compared.
MEASURED = re.compile(rb'"(seconds|memory_gb)": [\d.e+-]+|"logs": \{(.*?\}\s*)?\}', re.DOTALL)
# Manifests and copies repeat measured values, a database has its own order of writing, and a request may come after the end.
# Warnings belong to one start.
UNCOMPARED = re.compile(
    r".*lock|warnings\.jsonl|tensorboard/.*|checkpoints/.*/(manifest|copies)\.json|cache\.sqlite.*|trigger\..*"
)


def results(output: Path) -> dict[str, str]:
    """Return the digest of each file that a command must end with, except for dates and measured times."""
    digests = {}
    for path in sorted(output.rglob("*")) if output.is_dir() else [output]:
        name = path.relative_to(output).as_posix()
        if path.is_file() and not UNCOMPARED.fullmatch(name):
            data = path.read_bytes()
            if name == "timing.jsonl":
                data = repr([json.loads(line)["step"] for line in data.splitlines()]).encode()
            elif name == "cost.json":
                data = repr(
                    [[row[key] for key in ("name", "trained", "steps", "images")] for row in json.loads(data)["stages"]]
                ).encode()
            elif path.suffix != ".png":
                data = MEASURED.sub(b"", DATES.sub(b"", data))
            digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def difference(expected: dict[str, str], actual: dict[str, str]) -> str:
    """Return "" for equal results, otherwise the files that differ."""
    names = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    return f"{len(names)} files differ: {', '.join(names[:3])}" if names else ""
