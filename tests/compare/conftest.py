"""Runs for the pages over several runs."""

from pathlib import Path

import pytest
from run_folders import STAGE, jsonl, plain_grid
from tiny import job

from fastsd.config.schema import dump_config, load_config
from fastsd.sampling.grid import save_grid


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder with a log, other files by name, and sample grids: {step: shades for two prompts x two seeds}."""

    def make(name: str, rows: list[dict], *overrides: str, stages: str = STAGE, shades=None, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = load_config(job(tmp_path, tmp_path / "model", tmp_path / "images", stages), list(overrides))
        (folder / "config.json").write_text(dump_config(config))
        (folder / "log.jsonl").write_text(jsonl(rows))
        for file, text in files.items():
            (folder / file.replace("_json", ".json")).write_text(text)
        for step, cell_shades in (shades or {}).items():
            (folder / "samples").mkdir(exist_ok=True)
            sheet = plain_grid(cell_shades, ["red circle", "blue <star>"], seed=7)
            save_grid(sheet, folder / "samples" / f"unet-{step:08d}.png", "unet", step)
        return folder

    return make
