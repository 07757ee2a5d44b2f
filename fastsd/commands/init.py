"""`fastsd init`: write a config for a base model, a folder of images and a card, and print the commands to give next.

Answers come from options. If there are none and somebody sits at a terminal, they are asked for. torch is imported only where a
model or a card is looked at, so that the first question comes at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastsd.commands.job_file import GOALS, commands, job_text
from fastsd.config.paths import expanded
from fastsd.config.schema import BucketTable, DataTable, LoraTable, parse_config
from fastsd.config.stages import StageTable
from fastsd.data.building.buckets import Buckets
from fastsd.data.sources import folders
from fastsd.data.sources.image import DataSource, Rejected
from fastsd.errors import UserError
from fastsd.terminal.console import STDOUT, Console

if TYPE_CHECKING:
    from fastsd.model.formats.model_source import ComponentFiles
    from fastsd.model.shapes import Shapes
    from fastsd_kernels.cards import Card

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
VAE = "stabilityai/sdxl-vae"
TOKENIZER = "openai/clip-vit-large-patch14"
DISPLAY = 1.0  # GiB left for a display
LOOKED_AT = 1000  # images whose size and caption are read, at least, if there are as many
CUT_OFF = 0.1  # share of the images that squares may cut off before buckets are proposed
STEPS = 8  # fewest steps of an epoch
PROMPTS, LONGEST = 3, 200  # captions that become prompts, and the most characters of one
T = TypeVar("T")


@dataclass(frozen=True)
class Answers:
    """The options of the command, as they were typed; "" = not given."""

    goal: str = ""
    base: str = ""
    vae: str = ""
    images: str = ""
    card: str = ""
    precision: str = ""
    until: str = ""
    resolution: str = ""
    vae_scaling_factor: str = ""


class Memory(NamedTuple):
    """The memory of a card in GiB, and the card if its data is known."""

    name: str
    gib: float
    card: Card | None

    @property
    def room(self) -> float:
        return self.gib - DISPLAY

    @property
    def options(self) -> str:
        """Options of `fastsd plan` for this card and a display."""
        card = f"--card {self.card.name.split()[-1]} " if self.card else ""
        return f"{card}--vram {self.room:g}"


class Images(NamedTuple):
    """The contents of a folder of images. `sizes` and `captions` are of the images that were looked at."""

    path: str
    total: int
    sizes: list[tuple[int, int]]
    captions: list[str]

    @property
    def extent(self) -> str:
        low, high = min(self.sizes, key=_area), max(self.sizes, key=_area)
        return f"{low[0]} x {low[1]} to {high[0]} x {high[1]} px" if low != high else f"all {low[0]} x {low[1]} px"


def init(out: Path | None, answers: Answers, ask: Callable[[str], str] | None = None, console: Console = STDOUT) -> Path:
    """Write a config and print the commands to give next. Return its path.

    Args:
        out: the file; None = named after the folder of images and the goal.
        answers: the options of the command.
        ask: asks a question and returns the answer; None = options and defaults are the answers.

    Raises:
        UserError: an answer cannot be used. If `ask` is given, the question is asked again instead.
    """

    def answer(question: str, text: str, default: str, use: Callable[[str], T]) -> T:
        while True:
            try:
                reply = (ask(f"{question}{f' [{default}]' if default else ''}: ").strip() if ask else text) or default
                return use(reply)
            except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
                console.echo("")  # ends the line of the question
                raise KeyboardInterrupt from None
            except UserError as error:
                if ask is None:
                    raise
                console.echo(str(error))

    if out:
        _new_file(str(out))
    if ask:
        for name, kind in GOALS.items():
            console.echo(f"{name:<14}{kind.title}")
    goal = answer("goal", answers.goal, "vae" if ask or answers.vae else "finetune", _goal)
    console.echo("a model is a folder, a .safetensors file or a hub id" if ask else "reading the base model's names and shapes")
    model: dict[str, Any] = {}
    shapes = answer("base model", answers.base, BASE, lambda text: _base(text, model, console))
    default_vae = VAE if goal == "vae" else ""
    if default_vae or answers.vae:
        factor = answers.vae_scaling_factor
        shapes = answer("VAE", answers.vae, default_vae, lambda text: _vae(text, factor, shapes, model, ask, console))
    images = answer("folder of images", answers.images, "", _images)
    console.echo(f"{images.total} images in {images.path}, {_captioned(images)}, {images.extent}")
    memory = answer("card, or its memory in GiB", answers.card, _this_card(), _memory)
    name = re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(images.path)).name).strip("-.") or "images"
    default_out = str(out) if out else f"{name}-{goal}.toml"
    path = answer("config to write", default_out, default_out, _new_file)

    data = _data(images, shapes, answers.resolution)
    stage = _stage(goal, answers, shapes, data, images, memory, console)
    run = f"runs/{path.stem}"
    prompts = [text for text in dict.fromkeys(images.captions) if len(text) <= LONGEST and " --" not in text][:PROMPTS]
    steps = commands(str(path), run, memory.options, prompts[0] if prompts else "a red fox in the snow")
    keys = _tables(goal, run, model, name, data, images, prompts)
    fits = f"for {memory.name} with {DISPLAY:g} GiB left for a display"
    _write(path, job_text(f"{GOALS[goal].title[0].upper()}{GOALS[goal].title[1:]}, {fits}.", keys, stage, steps))
    console.echo(f"{path} written: batch {stage.batch} = {stage.batch // stage.micro_batch_size} x {stage.micro_batch_size}")
    console.echo("next:")
    for command in steps:
        console.echo(f"  {command}")
    return path


def _goal(text: str) -> str:
    if text not in GOALS:
        raise UserError("init-goal", f"--goal is {text!r}; choose from {', '.join(GOALS)}")
    return text


def _base(text: str, model: dict[str, Any], console: Console) -> Shapes:
    """Look at a base model, and set its keys in `model`. Return its shapes."""
    from fastsd.model.formats.model_source import find_tokenizer
    from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, check_text_to_image
    from fastsd.model.unet import UNetConfig

    base = _expanded(text)
    components = _components(base, "--base", ("unet", "text_encoder", "vae"), console)
    model.clear()
    model["base"] = base, "diffusers folder, .safetensors file or hub id"
    if components is None:  # a hub id that is downloaded later
        return Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    if not Path(base).expanduser().is_dir() and Path(base).expanduser().exists() and find_tokenizer(Path(base)) is None:
        model["tokenizer"] = TOKENIZER, "a single file has none"
    unet = UNetConfig.from_diffusers(components["unet"].config, components["unet"].config_file)
    check_text_to_image(unet, base)
    return Shapes(unet, components["text_encoder"].config, components["vae"].config)


def _vae(
    text: str, factor: str, shapes: Shapes, model: dict[str, Any], ask: Callable[[str], str] | None, console: Console
) -> Shapes:
    """Look at a VAE, and set its keys in `model`. Return the shapes with it."""
    from dataclasses import replace

    from fastsd.model.formats.load import check_vae_channels

    vae = _expanded(text)
    components = _components(vae, "--vae", ("vae",), console)
    if components is None:
        model["vae"] = vae, "the new VAE"
        return shapes
    config = components["vae"].config
    check_vae_channels(vae, config.get("latent_channels", 4), model["base"][0], shapes.unet.in_channels)
    if "scaling_factor" not in config and Path(vae).expanduser().is_file():
        factor = factor or (ask("scaling factor of the VAE [0.13025]: ").strip() or "0.13025" if ask else "")
        if not re.fullmatch(r"\d*\.?\d+", factor) or not float(factor):
            raise UserError(
                "init-scaling-factor",
                f"--vae-scaling-factor is {factor!r}, and {vae} has none; give 0.13025 for SDXL's VAE, 0.18215 for SD1.5's",
            )
        model["vae_scaling_factor"] = float(factor), "the VAE's file has none"
    model["vae"] = vae, "the new VAE"
    return replace(shapes, vae=config)


def _expanded(text: str) -> str:
    try:
        return expanded(text)
    except ValueError as error:
        raise UserError("init-path", str(error)) from None


def _components(name: str, option: str, wanted_names: tuple[str, ...], console: Console) -> dict[str, ComponentFiles] | None:
    """Open components of a model without reading their weights. Return None for a hub id that is not on this machine.

    Raises:
        UserError: a component is missing, or its tensors are not those of the SD1.5 family.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from fastsd.model.formats.model_source import check_component, locate, open_file, read_component

    if not Path(name).expanduser().exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        try:
            place = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            console.echo(f"{name} is no path here: it is taken as a hub id, and downloaded when it is first needed")
            return None
    else:
        place = locate(name, option)
    file = open_file(place) if place.is_file() else None
    components = {}
    for component in wanted_names:
        opened = file.read(component, []) if file else read_component(place, component)
        if opened is None:
            raise UserError("init-component", f"{option} is {name!r}, which has no {component}; give a complete model")
        components[component] = check_component(component, opened, [])
    return components


def _images(text: str) -> Images:
    """Look into a folder of images: count them, and read sizes and captions of some."""
    from fastsd.data.building.decode import probe

    if not text:
        raise UserError("init-no-images", "no folder of images is given; add --images FOLDER")
    path = _expanded(text)
    count, stride, chosen = 0, 1, list[DataSource]()
    for source in folders.scan_for(DataTable(folders=[path])):
        if not source.problem:
            if count % stride == 0:
                chosen.append(source)
            count += 1
            if len(chosen) > 2 * LOOKED_AT:
                chosen, stride = chosen[::2], 2 * stride
    sizes, captions, reason = [], [], ""
    for source in chosen:
        try:
            sizes.append(probe(folders.read_bytes(source)))
            captions.append(next(iter(folders.captions_of(source)), ""))
        except Rejected as error:
            reason = reason or f"{source.name}: {error.reason}"
    if not sizes:
        raise UserError("init-unusable-images", f"--images is {path}, which has no usable image ({reason}); add images")
    return Images(path, count, sizes, [text for text in captions if text])


def _captioned(images: Images) -> str:
    share = len(images.captions) / len(images.sizes)
    return "all with captions" if share == 1 else "none with a caption" if not share else f"{share:.0%} with captions"


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _this_card() -> str:
    """Return the name of this machine's GPU, or its memory in GiB if its type is not known; 24 without a GPU."""
    import torch

    from fastsd.plan.gpu_specs import gpu_of

    if not torch.cuda.is_available():
        return "24"
    card = gpu_of(torch.device("cuda", 0))
    return card.name if card else f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}"


def _memory(text: str) -> Memory:
    from fastsd.plan.gpu_specs import find_gpu

    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB?|GiB)?", text, re.IGNORECASE)
    if match and DISPLAY < float(match[1]) < 1000:  # 4090 is a card
        return Memory(f"a card of {float(match[1]):g} GiB", float(match[1]), None)
    card = find_gpu(text, f"give its memory in GiB, above {DISPLAY:g}")
    return Memory(f"{card.name} ({card.memory:g} GiB)", card.memory, card)


def _new_file(text: str) -> Path:
    path = Path(_expanded(text))
    if path.suffix != ".toml":
        raise UserError("init-out-ending", f"OUT is {str(path)!r}; choose a name that ends in .toml")
    if path.exists():
        raise UserError("init-out-exists", f"{path} already exists; name another file: fastsd init OTHER.toml ...")
    return path


def _data(images: Images, shapes: Shapes, resolution: str) -> DataTable:
    """Choose resolution and buckets. The resolution is that of the base, and buckets are for images that are not square."""
    downscale = 2 ** (len(shapes.vae["block_out_channels"]) - 1)
    step = downscale * shapes.unet.downscale
    if resolution and not resolution.isdecimal():
        raise UserError("init-resolution", f"--resolution is {resolution!r}; give px, for example 512")
    side = int(resolution) if resolution else max(shapes.unet.sample_size * downscale // step, 1) * step
    shapes.side(side)
    cut_off = sum(1 - min(size) / max(size) for size in images.sizes) / len(images.sizes)
    buckets = None
    if cut_off > CUT_OFF:
        bucket_step = max(side // 8 // downscale, 1) * downscale
        low, high = (max(int(share * side) // bucket_step, 1) * bucket_step for share in (0.5, 2))
        buckets = BucketTable(min=low, max=high, step=bucket_step)
    return DataTable(folders=[images.path], resolution=side, buckets=buckets)


def _stage(
    goal: str, answers: Answers, shapes: Shapes, data: DataTable, images: Images, memory: Memory, console: Console
) -> StageTable:
    """Return the stage of a goal that fits the card."""
    from dataclasses import replace

    from fastsd.plan.fitting import fitting_stage
    from fastsd.plan.plan import GIB, RESERVED

    console.echo(f"planning for {memory.name}")
    kind = GOALS[goal]
    keys = kind.stage | {"precision": answers.precision or "bf16"}
    keys["until"] = (int(answers.until) if answers.until.isdecimal() else answers.until) if answers.until else keys["until"]
    while keys["batch"] > 1 and images.total < STEPS * keys["batch"]:
        keys["batch"] //= 2
    candidates = [keys]
    if kind.lion_lr:
        lion = keys | {"optimizer": "lion", "lr": kind.lion_lr}
        fused = {key: value for key, value in lion.items() if key != "grad_clip"} | {"fused_backward": True}
        sizes = [keys["batch"] >> n for n in range(keys["batch"].bit_length())]
        candidates += [lion, *(fused | {"batch": size} for size in sizes)]
    if goal == "lora":
        shapes = replace(shapes, lora=LoraTable())
    room = int(memory.room * GIB) - RESERVED
    model, table = {"base": "base", "lora": {}}, {"folders": data.folders}
    stages = [parse_config({"model": model, "data": table, "stage": [stage]}, "fastsd init").stage[0] for stage in candidates]
    stage = fitting_stage(shapes, stages, data.resolution, room, memory.card)
    if stage is None:
        raise UserError(
            "init-does-not-fit",
            f"--card is {memory.name}: no settings of the goal {goal} fit {memory.room:g} GiB at {data.resolution} px; choose "
            f"{'a larger card' if goal == 'lora' else 'a larger card, or --goal lora'}",
        )
    return stage


def _tables(
    goal: str, run: str, model: dict[str, Any], name: str, data: DataTable, images: Images, prompts: list[str]
) -> dict[str, dict[str, tuple[Any, str]]]:
    """Return the tables of the config but the stage, with the meaning of each key."""
    side, buckets = data.resolution, data.buckets
    keys: dict[str, dict[str, tuple[Any, str]]] = {"": {"run": (run, "folder for all files of the run")}, "model": model}
    if goal == "lora":
        keys["model.lora"] = {"rank": (4, "rank of the adapters")}
    keys["data"] = {
        "folders": ([images.path], f"{images.total} images, {_captioned(images)}, {images.extent}"),
        "resolution": (side, "px, side of the square" if buckets is None else "px, square root of the largest bucket area"),
    }
    if buckets:
        count = len({Buckets(side, buckets).place(*size).size for size in images.sizes})
        keys["data.buckets"] = {
            "": (None, f"aspect ratios instead of squares; these images use {count}"),
            "min": (buckets.min, "px, shortest side"),
            "max": (buckets.max, "px, longest side"),
            "step": (buckets.step, "px, sides are multiples of it"),
        }
    keys["cache"] = {"dir": (f"cache/{name}", "folder of the latent cache, which runs may share")}
    keys["sample"] = {"prompts": (prompts or ["a red fox in the snow"], "one row of the grid each")}
    if size := min(images.total // 20, 512):
        keys["validate"] = {
            "held_out": (size, "images never trained on, whose loss is measured"),
            "stabilised": (size, "training images measured the same way"),
            "every": (GOALS[goal].validate_every, "interval: steps, or epochs"),
        }
    return keys


def _write(path: Path, text: str) -> None:
    """Write a new file. An existing one is never replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError("init-out-exists", f"{path} already exists; name another file: fastsd init OTHER.toml ...") from None
