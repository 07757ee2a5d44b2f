"""Every config in configs/ with the demo's model and images and a few steps, and the reports that its README describes."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from environment import ROOT
from PIL import Image
from runs import same
from safetensors.torch import load_file

from fastsd.commands.cache import cache
from fastsd.commands.check import check
from fastsd.commands.long_clip import long_clip
from fastsd.commands.redraw import redraw
from fastsd.commands.swap_vae import swap_vae
from fastsd.compare.compare import compare
from fastsd.compare.sweep import sweep
from fastsd.config.schema import ModelTable, load_config
from fastsd.demo.demo import MODELS
from fastsd.demo.world import write_dataset
from fastsd.model.formats.load import load_model
from fastsd.run import checkpoint
from fastsd.run.loop import train
from fastsd.terminal.console import Console

pytestmark = pytest.mark.slow

SMALL = {
    "data.resolution": 32, "sample.prompts": ["a red circle"], "sample.images": 1, "sample.steps": 2, "sample.guidance": 2.0,
    "log.every": 1, "log.tensorboard": False, "stage.until": 2, "stage.batch": 4, "stage.micro_batch": 4,
    "stage.sample_every": 2, "stage.checkpoint_every": 2,
}  # fmt: skip
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))


class World:
    """A dozen images, and small versions of the shipped configs that train on them."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        write_dataset(self.images, 12, seed=1)

    def keys(self, name: str, **overrides: object) -> list[str]:
        """Return the overrides that make configs/NAME.toml small."""
        text = (ROOT / "configs" / f"{name}.toml").read_text()
        small: dict[str, object] = {"model.base": MODELS / "base", "data.folders": [str(self.images)]}
        small |= {"run": self.folder / name, "cache.dir": self.folder / "cache"} | SMALL
        if "[validate]" in text:
            small |= {"validate.held_out": 4, "validate.every": 2, "validate.bands": 2, "validate.per_band": 1}
        if "stabilised" in text:
            small["validate.stabilised"] = 4
        values = (small | overrides).items()
        return [f"{key}={json.dumps(value) if isinstance(value, (list, bool)) else value}" for key, value in values]

    def config(self, name: str, **overrides: object):
        return load_config(ROOT / "configs" / f"{name}.toml", self.keys(name, **overrides))

    def train(self, name: str, **overrides: object) -> Path:
        config, console = self.config(name, **overrides), Console(file=StringIO())
        cache(config, console)
        train(config, console)
        return Path(config.run)

    def report(self, name: str, *runs: Path, **options) -> dict:
        """Write a report, check its images, and return its tables."""
        out = self.folder / f"{name}.html"
        compare(runs, out, console=Console(file=StringIO()), **options)
        assert "data:image" in out.read_text()
        for picture in (self.folder / name).glob("*.png"):
            assert Image.open(picture).size[0] > 100
        return json.loads((self.folder / name / "tables.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def rows(run: Path, file: str = "log") -> list[dict]:
    return [json.loads(line) for line in (run / f"{file}.jsonl").read_text().splitlines()]


def stage_ends(run: Path) -> list[Path]:
    """Return the checkpoints at the ends of stages, which have two steps each."""
    return [path for path in checkpoint.checkpoints(run / "checkpoints") if int(path.name[5:]) % 2 == 0]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "demo.toml"])
def test_check_passes_with_faked_folders(name, world):
    """The configs are checked as shipped, except for the base, the VAE and the folders."""
    config = world.config(name.removesuffix(".toml"))
    shipped = load_config(ROOT / "configs" / name)
    faked = {"base": str(MODELS / "base"), "vae": str(MODELS / "vae") if shipped.model.vae else ""}
    config = shipped.model_copy(
        update={
            "model": shipped.model.model_copy(update=faked),
            "cache": config.cache,
            "run": config.run,
            "validate_": config.validate_,
            "data": shipped.data.model_copy(update={"folders": [str(world.images)], "resolution": 64}),
            "sample": shipped.sample.model_copy(update={"size": 64}),
        }
    )
    out = StringIO()
    cache(config, Console(file=out))
    check(config, Console(file=out, width=200))
    assert "error" not in out.getvalue() and out.getvalue().count("ok    ") >= 6 + len(config.stage) - 1


def test_xlsd(world):
    """Three stages with a swapped VAE are followed by a run with a longer text encoder."""
    run = world.train("xlsd", **{"model.vae": MODELS / "vae"})
    texts = [load_file(path / "text_encoder/model.safetensors") for path in stage_ends(run)]
    unets = [load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in stage_ends(run)]
    assert same(unets[0], unets[1]) and not same(unets[1], unets[2])
    assert not same(texts[0], texts[1]) and same(texts[1], texts[2])
    assert {row["set"] for row in rows(run, "validation")} == {"held_out", "stabilised"}
    longer = world.folder / "xlsd-248"
    long_clip(str(run / "model"), longer, 248, console=Console(quiet=True))
    longer_run = world.train("xlsd-long", **{"model.base": longer})
    table = load_config(ROOT / "configs/demo.toml", [f"model.base={longer_run}/model", "model.vae="]).model
    assert load_model(table).text.window == 248
    world.report("xlsd-report", run, longer_run)


def test_a_vae_of_16_channels(world):
    """The aligned model is trained, and its VAE has the statistics of the cache that the VAE's own latents are in."""
    vae, start = MODELS / "vae16", world.folder / "vae16-start"
    cached = world.config("vae16", **{"model.vae": vae, "data.resolution": 64})
    cache(cached, Console(file=StringIO()))
    options = {"limit": 12, "fit": "kernel", "normalise": Path(cached.cache.dir), "console": Console(file=StringIO())}
    record = swap_vae(str(MODELS / "base"), str(vae), start, world.images, **options)
    assert (
        record["fits"]["kernel"]["loss"] < 0.3 * record["fits"]["plain"]["loss"]
        and len(record["fits"]["kernel"]["groups"]) == 4
    )
    assert "carried past all blocks" in (start / "README.md").read_text()
    run = world.train("vae16", **{"model.base": start, "data.resolution": 64})
    model = load_model(ModelTable(base=str(run / "model")))
    assert model.unet.cfg.in_channels == model.vae.channels == 16 and len(model.vae.latent_space.std) == 16


def test_overtraining(world):
    """Both runs have the same first stage, bit for bit. Then each trains one component."""
    points = {"stage.checkpoint_at": [1], "stage.keep_checkpoints": 1}
    unet, text = (world.train(f"overtrain-{trained}", **points) for trained in ("unet", "text"))
    assert rows(unet)[:2] == rows(text)[:2]
    for run, frozen in ((unet, "text_encoder/model"), (text, "unet/diffusion_pytorch_model")):
        weights = [load_file(path / f"{frozen}.safetensors") for path in stage_ends(run)]
        assert len(weights) == 3 and same(weights[0], weights[1]) and same(weights[1], weights[2])
        steps = [int(path.name[5:]) for path in checkpoint.checkpoints(run / "checkpoints")]
        assert steps == [1, 2, 3, 4, 5, 6]
    tables = world.report("overtrain", unet, text, drawing=["guidance=2"], from_checkpoints=True)
    assert tables and list((world.folder / "overtrain").glob("*.gif"))


def test_one_parameter(world):
    """Runs that differ only in clip skip train on the same samples and noise, and are sampled with each clip skip."""
    config = ROOT / "configs/one-parameter.toml"
    sweep(config, [*world.keys("one-parameter"), "model.clip_skip=0,1"], console=Console(file=StringIO()))
    root = world.folder / "one-parameter"
    runs = [root / "clip_skip=0", root / "clip_skip=1"]
    inputs = [[(row["order"], row["timesteps"], row["noise"]) for row in rows(run)] for run in runs]
    assert inputs[0] == inputs[1] and [row["loss"] for row in rows(runs[0])] != [row["loss"] for row in rows(runs[1])]
    assert (root / "report.html").stat().st_size > 10_000
    world.report("clip-skip", *runs, drawing=["clip_skip=0,1"])


def test_fine_tuning_against_lora(world):
    full, lora = (world.train(name) for name in ("finetune", "lora"))
    costs = [json.loads((run / "cost.json").read_text()) for run in (full, lora)]
    assert costs[0]["stages"][0]["trained"] > 20 * costs[1]["stages"][0]["trained"]
    assert costs[0]["file_bytes"] > 20 * costs[1]["file_bytes"] == 20 * (lora / "lora.safetensors").stat().st_size
    assert (full / "model-ema").is_dir() and (lora / "model").is_dir()
    world.report("finetune-lora", full, lora)


def test_flow(world):
    """The first stage learns from the base, the second from images, and the export is a flow."""
    run = world.train("flow")
    learned, trained = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in stage_ends(run))
    assert not same(learned, trained) and (run / "model-ema").is_dir()
    assert load_model(ModelTable(base=str(run / "model"))).prediction == "flow"
    assert all(len(row["start"]["mean"]) == 4 for row in rows(run, "validation"))
    world.report("flow-report", run)


def test_generated_images(world):
    """A model draws three data sets. The same training runs on each of them and on the originals."""
    config, console = world.config("generated"), Console(file=StringIO())
    cache(config, console)
    sets = {"drawn": None, "decoded": 0, "renoised": 200}
    for name, start in sets.items():
        redraw(str(MODELS / "base"), config, world.folder / name, start=start, console=console)
        assert len(list((world.folder / name).glob("*.png"))) == len(list((world.folder / name).glob("*.txt"))) == 12
    datasets = [world.images, *(world.folder / name for name in sets)]
    folders = ",".join(json.dumps([str(path)]) for path in datasets)
    keys = [key for key in world.keys("generated") if not key.startswith("data.folders")]
    sweep(ROOT / "configs/generated.toml", [*keys, f"data.folders={folders}"], console=console)
    run_names = json.loads((world.folder / "generated/sweep.json").read_text())["runs"]
    runs = [world.folder / "generated" / name for name in run_names]
    orders = [[row["order"] for row in rows(run)] for run in runs]
    assert all(order == orders[0] for order in orders)
    table = json.loads((world.folder / "generated/report/tables.json").read_text())
    assert len(run_names) == 4 and table
    shutil.rmtree(world.folder / "generated")
