"""A process that has imported everything and forks one process for each command, because imports take seconds.

It reads one JSON object a line: {"words": [...], "output": FILE, "environment": {...}, "patch": NAME}. It answers with two
lines: the id of the new process and, when that has ended, its exit code.

The new process is as real as one from a shell: it may be killed and obeys signals. Only the interpreter's last act is left out:
taking a thousand modules apart would take most of a trial's time.
"""

import atexit
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback

import broken_restores
import environment  # noqa: F401
import torch.utils.tensorboard.summary  # noqa: F401
from diffusers import schedulers  # noqa: F401
from diffusers.models.autoencoders import autoencoder_kl  # noqa: F401
from PIL import Image
from transformers.models.clip import modeling_clip, tokenization_clip  # noqa: F401

import fastsd.commands.cache
import fastsd.commands.convert
import fastsd.commands.sample
import fastsd.commands.validate
import fastsd.compare.compare
import fastsd.run.loop  # noqa: F401
from fastsd import cli


def next_command() -> dict | None:
    """Return the command of this process, after a fork. Return None in the server, when its input has ended."""
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if not pid:
            return command
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def become(command: dict) -> None:
    """Take the arguments, output and environment of a command, as if a shell had started it. Then tell the caller."""
    caller = os.dup(1)
    output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(file, stream)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.argv = ["fastsd", *command["words"]]
    broken_restores.apply(command["patch"])
    os.environ.update(command["environment"])
    ctypes.CDLL(None).fault_arm()
    os.write(caller, b"%d\n" % os.getpid())
    os.close(caller)


def leave(code: int) -> None:
    """End this process as the interpreter would."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run() -> int:
    """Run the command line and return the exit code."""
    try:
        cli.program()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT
        return 1
    return 0


if __name__ == "__main__":
    Image.init()
    gc.freeze()  # collections and copies of memory pages would take half a second in each process
    if command := next_command():
        become(command)
        leave(run())
