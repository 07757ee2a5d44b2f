"""Python programs without their slow imports: `subprocess` forks this process instead of starting the interpreter again.

    with forked_programs(): ...     in a process of its own that has few threads, see `commandline.processes`

A script or a module then starts in a copy of this process, which has PyTorch and fastsd. The modules beside the script are
imported anew, as in a new process. Programs that are not Python's start as always.
"""

import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from environment import ROOT


def forked_programs():
    """Return a context manager in which Python programs, and those that they start, are forks of this process."""
    return mock.patch.object(subprocess, "Popen", ForkedProgram)


class ForkedProgram(subprocess.Popen):
    """A program as `subprocess.Popen` describes it.

    Of the options, the folder, the environment, the streams and the new session count.
    """

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        streams = rest[3:9]  # after startupinfo, creationflags and shell: the ends of three pipes, or -1
        *_, start_new_session, _ = rest
        if args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        child_input, parent_input, parent_output, child_output, parent_errors, child_errors = streams
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            for end in {parent_input, parent_output, parent_errors} - {-1}:
                os.close(end)
            for stream, end in enumerate((child_input, child_output, child_errors)):
                if end != -1:
                    os.dup2(end, stream)
            end_process(lambda: run_program(list(map(str, args[1:])), cwd, env))
        self._child_created = True
        self._close_pipe_fds(*streams)


def run_program(words: Sequence[str], cwd: str | Path | None, env: dict[str, str] | None) -> None:
    """Run `python WORDS` in this process, as far as scripts and modules can see."""
    words = words[words[0] == "-u" :]
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    os.chdir(cwd or ".")
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == ROOT / "bench":
            del sys.modules[name]
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep) if env else []
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def end_process(program: Callable[[], None]) -> None:
    """Run a program and end this process as the interpreter would, without what the first process does at its end."""
    status = 1
    try:
        program()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
