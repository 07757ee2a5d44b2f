"""`log.notify`: run a command of the user's at events of a run, for example to send a mail or call a webhook.

Its environment has FASTSD_EVENT (stage, finished or error), FASTSD_RUN (the run's folder) and FASTSD_MESSAGE (one sentence).
Training does not wait for the command.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from fastsd.config.schema import Config
from fastsd.errors import Stopped
from fastsd.terminal.console import Console
from fastsd.train.ranks import RankLost

Event = Literal["stage", "finished", "error"]


def notify(config: Config, event: Event, message: str) -> None:
    """Start the command of the config, if it has one."""
    if not config.log.notify:
        return
    variables = {"FASTSD_EVENT": event, "FASTSD_RUN": config.run, "FASTSD_MESSAGE": message}
    # In a session of its own, it is not stopped by the Ctrl-C that stops the run.
    nothing = subprocess.DEVNULL
    subprocess.Popen(
        config.log.notify,
        shell=True,
        env=os.environ | variables,
        start_new_session=True,
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
    )


@contextmanager
def notified_end(config: Config, console: Console) -> Iterator[None]:
    """Notify the end of a run: finished, or an error. A run that the user stops is neither."""
    try:
        yield
    except Stopped:
        raise
    except RankLost:  # its text is a library's
        notify(config, "error", f"{config.run}: another rank has ended, or does not answer")
        raise
    except Exception as error:
        notify(config, "error", f"{config.run}: {console.copyable(str(error)) or type(error).__name__}")
        raise
    notify(config, "finished", f"{config.run}: all stages are complete")
