"""The schema of a config file and all of its defaults.

A config is TOML: a few top-level keys, the tables `[model] [data] [cache] [sample] [validate] [log] [export]`, and an
ordered list of `[[stage]]`.  Files in `configs/` are deltas from the defaults below.  An unknown key is an error with a "did
you mean" suggestion; keys reserved for a later version are refused by name, never ignored.  Read next: `configs/xlsd.toml`.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from fastsd.config.config_errors import sentence, unknown_keys
from fastsd.config.stages import Amount, StageTable, Table, parse_amount
from fastsd.errors import UserError


class LoraTable(Table):
    """Low-rank adapters (LoRA): the weight W of every target becomes W + alpha / rank * up @ down."""

    rank: int = Field(4, ge=1)
    alpha: float | None = Field(None, gt=0)  # unset = rank, which gives a factor of 1
    targets: list[str] = Field(["attention"], min_length=1)  # groups or names of linear layers, as in train minus component
    conv: int = Field(0, ge=0)  # rank of the adapters of 3x3 convolutions; 0 = none
    text_encoder: bool = False  # also add adapters to the targets in the text encoder
    file: str = ""  # start from this LoRA (.safetensors, with the names of any tool)


class ModelTable(Table):
    base: str  # diffusers folder, hub id, or one .safetensors in the original SD layout
    vae: str = ""  # folder, hub id or .safetensors file; "" = the VAE of the base
    tokenizer: str = ""  # "" = that of the base; a single file has none, so give a folder or hub id
    revision: str = ""  # of a base that is a hub id; "" = its default branch
    vae_scaling_factor: float | None = Field(None, gt=0)  # only for a VAE file without a config
    clip_skip: int = Field(0, ge=0)  # 0 = last layer; n = the n-th before it, then the final layer norm
    chunks: int = Field(1, ge=1, le=8)  # 1 = cut captions at 75 tokens; n = n windows of 75, encoded separately
    prediction: Literal["", "epsilon", "v_prediction"] = ""  # output of the UNet for x_t; "" = as in the base
    zero_snr: bool | None = None  # rescale the noise schedule to end in pure noise; unset = as in the base
    lora: LoraTable | None = None  # adapters, trained by train = ["lora"]: a table [model.lora]

    @model_validator(mode="after")
    def _check_prediction(self) -> ModelTable:
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError('prediction is "epsilon" and zero_snr is true; use "v_prediction" or zero_snr = false')
        return self


class FolderTable(Table):
    path: str  # a folder, searched recursively; a .tar; or a pattern: {00000..00099}.tar
    repeats: int = Field(1, ge=1)  # times each of its images occurs in an epoch
    weight: float | None = Field(None, gt=0)  # instead of repeats: share of an epoch relative to other folders' weights
    loss_weight: float = Field(1.0, ge=0)  # factor of the loss of its images


class BucketTable(Table):
    """Aspect-ratio buckets, with the keys and meanings of kohya's trainers."""

    min: int = Field(256, ge=8)  # px, shortest side of a bucket
    max: int = Field(1024, ge=8)  # px, longest side of a bucket
    step: int = Field(64, ge=8)  # px, all sides are multiples of it
    no_upscale: bool = False  # never enlarge images: small ones get buckets of their own size

    @model_validator(mode="after")
    def _check_sides(self) -> BucketTable:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max {self.max}; lower min or raise max")
        if self.min % self.step:
            below = max(self.min // self.step, 1) * self.step
            raise ValueError(f"min is {self.min}, not a multiple of step {self.step}; use {below}")
        if self.max % self.step:
            above = -(-self.max // self.step) * self.step
            raise ValueError(f"max is {self.max}, not a multiple of step {self.step}; use {above}")
        return self


class DataTable(Table):
    # Each entry is a path, { path = "...", repeats = 2 } or { path = "...", weight = 0.5 }. Captions lie beside their images
    # (.txt or .caption, several lines = variants), in the folder's metadata.jsonl or .parquet, or in the tar.
    folders: list[str | FolderTable] = Field(min_length=1)
    resolution: int = Field(512, ge=8)  # px: side of the square, or square root of the largest bucket area
    crop: Literal["centre", "random"] = "centre"  # position of the square or bucket in the resized image
    crops: int = Field(1, ge=1, le=64)  # random crops stored per image; training picks one each time
    flip: bool = False  # also store mirrored latents; training picks either version
    buckets: BucketTable | None = None  # aspect-ratio buckets instead of squares: a table [data.buckets]
    latents: Literal["", "img_sdxl", "img_sdvae", "npz"] = ""  # "" = encode; otherwise import latents of another trainer
    caption_key: str = ""  # key in metadata and .json; "" = the first of text, caption, prompt
    weight_key: str = ""  # key in metadata of a factor of the image's loss; "" = none
    masks: str = ""  # suffix of masks beside images, "-mask.png": white is learned; "" = none
    include: list[str] = []  # use only images with at least one of these tags
    exclude: list[str] = []  # use no image with any of these tags

    @property
    def roots(self) -> list[FolderTable]:
        return [FolderTable(path=f) if isinstance(f, str) else f for f in self.folders]

    @model_validator(mode="after")
    def _check_options(self) -> DataTable:
        if self.crops > 1 and self.crop != "random":
            raise ValueError(f'crops is {self.crops} and crop is {self.crop!r}; set crop = "random" or crops = 1')
        if self.latents and (self.crop != "centre" or self.buckets):
            option = "buckets" if self.buckets else "crop"
            raise ValueError(f"latents is {self.latents!r}, images cropped by another trainer; remove {option}")
        if self.latents.startswith("img") and self.flip:
            raise ValueError(f"flip is true and {self.latents} files have no mirrored latents; remove flip")
        if self.buckets and self.buckets.min > self.resolution:
            raise ValueError(f"buckets.min is {self.buckets.min}, above resolution {self.resolution}; lower it")
        if self.buckets and self.buckets.max < self.resolution:
            raise ValueError(f"buckets.max is {self.buckets.max}, below resolution {self.resolution}; raise it")
        for root in self.roots:
            if root.weight is not None and root.repeats != 1:
                raise ValueError(f"folder {root.path} has repeats and weight; remove one of them")
        return self


class CacheTable(Table):
    dir: str = "cache"  # may be shared: keys include image, VAE and preprocessing
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of the stored posterior mean; fp16 is 32 KiB per image at 512 px
    precision: Literal["fp32", "bf16"] = "fp32"  # of the VAE encoder; no fp16, because SDXL's VAE overflows in it
    batch: int = Field(8, ge=1)  # images per VAE call, and the unit of work an interruption can lose
    workers: int = Field(0, ge=0)  # decoding threads; 0 = one per core
    # Also store the text embeddings of every caption, so that training needs no text encoder on the GPU. For stages that
    # neither train it nor edit captions. 116 KiB per caption in fp16. `precision` applies to the text encoder, too
    hidden_states: bool = False


class SampleTable(Table):
    prompts: list[str] = []  # one row of the grid per prompt
    prompts_file: str = ""  # file of more prompts, one per line
    negative: str = ""  # negative prompt: the unconditional side of the guidance
    images: int = Field(2, ge=1)  # columns: images per prompt, each with its own fixed seed
    seed: int = Field(0, ge=0)  # of the first column; each further column adds 1
    sampler: Literal["ddim", "euler", "euler_a", "dpm++"] = "dpm++"
    steps: int = Field(20, ge=1)
    guidance: float = Field(7.0, ge=0)  # classifier-free guidance scale; 1 = off
    size: int = Field(0, ge=0)  # px; 0 = data.resolution


class ValidateTable(Table):
    """A loss for comparisons: the same images, noise and timesteps before the first step and at every interval `every`."""

    held_out: int = Field(0, ge=0)  # images that are never trained on; 0 = none
    stabilised: int = Field(0, ge=0)  # training images measured the same way: training loss without its noise
    every: Amount = "1e"  # interval: steps, "1e", "30m"; also measured where a stage starts or ends
    bands: int = Field(5, ge=1, le=100)  # equal ranges of timesteps, reported separately
    per_band: int = Field(2, ge=1)  # timesteps measured per image and band
    batch: int = Field(8, ge=1)  # images per forward
    seed: int = Field(0, ge=0, lt=2**63)  # selects images, noise and timesteps
    # Identity of an image, used with `seed`. "content" = its latents: neither its path nor added images matter. "number" = its
    # number in the cache: for data sets with corresponding images, such as those of `fastsd redraw`
    by: Literal["content", "number"] = "content"


class LogTable(Table):
    every: int = Field(10, ge=1)  # steps between log lines; values are read one line late, without waiting
    tensorboard: bool = True  # event files under RUN/tensorboard; RUN/log.jsonl is always written
    wandb: str = ""  # project name; needs the extra: pip install "fastsd[wandb]"


class ExportTable(Table):
    """Output of a run besides RUN/model, which is always written: a diffusers folder in fp32, as exact as the checkpoint."""

    single_file: bool = True  # also write RUN/model.safetensors, the SD layout of ComfyUI and A1111
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of that file
    fold: bool = True  # fold the VAE's scaling factor into its weights: other tools assume 0.18215
    lora: Literal["kohya", "peft"] = "kohya"  # names in RUN/lora.safetensors: kohya's, read by all tools, or diffusers'
    title: str = ""  # in files and model card; "" = the name of the run's folder
    author: str = ""  # in files and model card; "" = omitted
    license: str = ""  # in files and model card, a hub name: "creativeml-openrail-m"; "" = omitted


class Config(Table):
    model: ModelTable
    data: DataTable
    stage: list[StageTable] = Field(min_length=1)
    cache: CacheTable = CacheTable()
    sample: SampleTable = SampleTable()
    validate_: ValidateTable = Field(ValidateTable(), alias="validate")
    log: LogTable = LogTable()
    export: ExportTable = ExportTable()
    run: str = "runs/run"  # folder of all files of a run; the same command again resumes from it
    seed: int = Field(0, ge=0, lt=2**63)  # of all noise, timesteps, dropout and order
    kernels: Literal["auto", "triton", "reference"] = "auto"  # the Ops table; auto = triton on a GPU it is built for
    device: str = "auto"  # auto = cuda if available, otherwise cpu
    cuda_graph: bool = True  # replay the whole step as one CUDA graph on a GPU; results are equal
    deterministic: bool = True  # exact resume on a GPU; false = cuDNN times its algorithms at every start

    def stage_name(self, index: int) -> str:
        return self.stage[index].name or f"stage-{index + 1}"

    @model_validator(mode="after")
    def _check_hidden_states(self) -> Config:
        for i, stage in enumerate(self.stage if self.cache.hidden_states else ()):
            conflict = f"cache.hidden_states is true and stage {self.stage_name(i)!r}"
            if "text_encoder" in stage.train:
                raise ValueError(f"{conflict} trains the text encoder; set cache.hidden_states = false")
            for key in ("shuffle_tags", "tag_dropout", "max_tags", "shuffle_sentences"):
                if getattr(stage, key):
                    raise ValueError(f"{conflict} edits captions by {key}; remove {key}, or set cache.hidden_states = false")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Config:
        for i, stage in enumerate(self.stage):
            name = self.stage_name(i)
            if "lora" in stage.train and self.model.lora is None:
                raise ValueError(f'stage {name!r} trains "lora" and [model.lora] is missing; add the table')
            if stage.state == "carry" and i == 0:
                raise ValueError(f'stage {name!r} has state = "carry" and is the first; remove state')
            for key in ("optimizer", "betas", "train") if stage.state == "carry" else ():
                previous, current = getattr(self.stage[i - 1], key), getattr(stage, key)
                if previous != current:
                    raise ValueError(
                        f'stage {name!r} has state = "carry" and {key} {current!r}, the stage before it {previous!r}; '
                        'set state = "reset"'
                    )
        if self.validate_.held_out or self.validate_.stabilised:
            parse_amount("validate.every", self.validate_.every)
        elif self.validate_.every != ValidateTable().every:
            raise ValueError("validate.every is set, but held_out and stabilised are 0; set validate.held_out, for example 256")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Config:
        names = [self.stage_name(i) for i in range(len(self.stage))]
        for i, name in enumerate(names):
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"stage {i + 1} is named {name!r}; use letters, digits, '.', '_' and '-'")
            if name in names[:i]:
                raise ValueError(f"two stages are named {name!r}; rename one of them")
        return self


_TABLES: dict[str, type[Table]] = {
    "model": ModelTable, "model.lora": LoraTable, "data": DataTable, "data.buckets": BucketTable, "cache": CacheTable,
    "sample": SampleTable, "validate": ValidateTable, "log": LogTable, "export": ExportTable, "stage": StageTable,
}  # fmt: skip


def load_config(path: str | Path, overrides: list[str] | None = None, precision: str | None = None) -> Config:
    """Read and check a config file.

    Args:
        path: the TOML file.
        overrides: `key=value` with dotted keys and TOML values (bare words are strings): `seed=7`, `model.vae=my-vae`,
            `stage.0.lr=1e-5` (by index), `stage.unet.batch=8` (by name), `stage.batch=8` (in every stage).
        precision: replaces the precision of every stage.

    Raises:
        UserError: the config is invalid. The message has one sentence per problem: file, field, value found, what to do.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "config-missing", f"{path} does not exist; use the path of a .toml file, for example configs/xlsd.toml"
        ) from None
    except IsADirectoryError:
        raise UserError("config-is-folder", f"{path} is a folder; use the path of a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError("config-no-toml", f"{path} cannot be read as TOML ({error}); fix the file") from None
    for item in overrides or []:
        _override(raw, item)
    if precision is not None:
        _override(raw, f"stage.precision={precision}")
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str) -> Config:
    """Validate a parsed TOML dict. Raises UserError with one line per problem; each line starts with `source`."""
    problems = unknown_keys(raw, {field.alias or name for name, field in Config.model_fields.items()}, _TABLES)
    try:
        config = Config.model_validate(raw, strict=True)
    except ValidationError as error:
        for item in error.errors():
            if item["type"] != "extra_forbidden":
                problems.append(sentence(item))
    if problems:
        raise UserError("config-invalid", "\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return config


def dump_config(config: Config) -> str:
    """Serialise the resolved config, including defaults, as JSON with sorted keys."""
    return json.dumps(config.model_dump(by_alias=True), indent=2, sort_keys=True) + "\n"


def parse_value(text: str) -> Any:
    """Parse a value from the command line as TOML, or return the text unchanged if it is not TOML."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError("override-form", f"{item!r} is not an override; use key=value, for example stage.0.batch=8")
    value = parse_value(text)
    *parents, last = key.strip().split(".")
    targets: list[Any] = [raw]
    for segment in parents:
        targets = [child for target in targets for child in _descend(target, segment, key)]
    for target in targets:
        for table in target if isinstance(target, list) else [target]:
            table[last] = value


def _descend(target: Any, segment: str, key: str) -> list[Any]:
    if isinstance(target, list):
        if segment.isdigit() and int(segment) < len(target):
            return [target[int(segment)]]
        stages = [stage for i, stage in enumerate(target) if stage.get("name", f"stage-{i + 1}") == segment]
        if not stages:
            raise UserError(
                "override-no-stage", f"override {key}: stage {segment!r} does not exist; use a number from 0 or a stage's name"
            )
        return stages
    child = target.setdefault(segment, {})
    if not isinstance(child, (dict, list)):
        raise UserError("override-no-table", f"override {key}: {segment!r} is a value, not a table; use {segment}=...")
    return [child]
