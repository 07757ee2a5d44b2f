"""`fastsd lr-probe`: a short D-Lion run that finds a learning rate for Lion.

D-Lion's step is d * lr * sign(...), Lion's is lr * sign(...). d rises from d0 until it estimates the distance to a solution,
and then stays constant. The two signs differ: Lion takes the sign of a gradient averaged over a hundred steps. D-Lion scales
its momentum by d * lr but not the gradient it adds, so its sign is nearly that of the latest gradient. Lion's steps keep their
direction for longer, and a third of the step size suffices. `bench/lr_probe.py` compares the result with the best of a sweep.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastsd.config.keys import conditions, defaults
from fastsd.config.schema import Config, StageTable
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.run.folder import LogRow
from fastsd.run.loop import train
from fastsd.terminal.console import STDOUT, Console

SHARE = 1 / 3  # Lion's lr divided by D-Lion's d * lr
LAST, FLAT = 4, 1.02  # d has settled if it grew by at most the factor FLAT over the last 1 / LAST of the run
ROWS = 100  # log rows of a probe
# A probe uses the defaults of these keys, and of the options of single optimizers.
_RESET = ["lr", "schedule", "restarts", "betas", "state", "ema", "ema_power", "ema_after", "ema_snapshots"]
_RESET += ["ema_snapshot_dtype", "sample_every", "checkpoint_at"]


@dataclass(frozen=True)
class Probe:
    """Result of a probe for one component, read from the log.

    Attributes:
        plateau: d * lr at the end.
        growth: factor by which d grew in the last quarter of the run.
        left_d0: True if d has risen above d0.
    """

    component: str
    plateau: float
    growth: float
    left_d0: bool

    @property
    def rate(self) -> float:
        """The lr for Lion."""
        return self.plateau * SHARE

    @property
    def settled(self) -> bool:
        return self.left_d0 and self.growth <= FLAT


def lr_probe(config: Config, steps: int, stage: str = "", console: Console = STDOUT) -> list[Probe]:
    """Train one stage of a config with D-Lion for `steps` steps in RUN/lr-probe, and print the learning rate for Lion.

    Args:
        stage: name of the stage; "" = the first stage.

    Raises:
        UserError: the stage does not exist, or the training fails.
    """
    probe_config = _probe_config(config, steps, stage)
    folder = Path(probe_config.run)
    train(probe_config, console, export=False)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the next probe must not resume this one
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    probes = [_read(name, i, rows, probe_config.stage[0].d0) for i, name in enumerate(_components(rows))]
    for probe in probes:
        console.echo(_sentence(probe, steps))
    return probes


def _probe_config(config: Config, steps: int, stage: str) -> Config:
    names = [config.stage_name(i) for i in range(len(config.stage))]
    if stage and stage not in names:
        raise UserError("probe-unknown-stage", f"--stage is {stage!r}; choose from {', '.join(names)}")
    index = names.index(stage) if stage else 0
    stage_table = config.stage[index]
    options = [key for key, only in conditions(StageTable).items() if only.option == "optimizer"]
    reset = defaults(StageTable, _RESET + options)
    lengths = {"until": steps, "checkpoint_every": steps, "warmup": min(steps // 10, 100)}
    return config.model_copy(
        update={
            "run": str(Path(config.run) / "lr-probe"),
            "stage": [stage_table.model_copy(update={"optimizer": "dlion", **reset, **lengths})],
            "sample": config.sample.model_copy(update={"prompts": [], "prompts_file": ""}),
            "log": config.log.model_copy(update={"every": max(steps // ROWS, 1), "tensorboard": False, "wandb": ""}),
            "validate_": config.validate_.model_copy(update={"stabilised": 0}),
        }
    )


def _components(rows: list[LogRow]) -> list[str]:
    """Return the components that have a d in the log. A single component has the name "", because its key is just "d"."""
    return list(COMPONENTS) if any(key.startswith("d_") for key in rows[0]) else [""]


def _read(component: str, index: int, rows: list[LogRow], d0: float) -> Probe:
    key = f"d_{component}" if index else "d"
    d = [row[key] for row in rows]
    return Probe(component, d[-1], d[-1] / d[-1 - len(d) // LAST], d[-1] > d0)


def _sentence(probe: Probe, steps: int) -> str:
    subject = f"d of the {probe.component}" if probe.component else "d"
    if not probe.left_d0:
        return f"{subject} stayed at d0 for {steps} steps; no lr found: use --steps {3 * steps}, or a larger d0"
    if not probe.settled:
        return (
            f"{subject} is {probe.plateau:.2g} after {steps} steps and still rising (by {probe.growth - 1:.0%} in the last "
            f"quarter); use --steps {2 * steps}, or use lion, lr = {probe.rate:.1e} as a lower bound"
        )
    return f"{subject} settled at {probe.plateau:.2g}: use lion, lr = {probe.rate:.1e}"
