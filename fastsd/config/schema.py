"""The schema of a config file and all of its defaults.

A config is TOML: a few top-level keys, the tables `[model] [data] [cache] [sample] [validate] [log] [export]`, and an
ordered list of `[[stage]]`.  Files in `configs/` set only what differs from the defaults below.  An unknown key is an error,
and the message suggests a similar key.  Read next: `configs/xlsd.toml`.

In every path, `~`, `$NAME` and `${NAME}` are expanded. Relative paths start at the current folder, as on the command line.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from fastsd.config.config_errors import sentence, unknown_keys
from fastsd.config.keys import CAPTION, keys_with
from fastsd.config.paths import PathText, expanded
from fastsd.config.stages import Amount, StageTable, Table, parse_amount
from fastsd.errors import UserError

Chunks = int | Literal["auto"]  # ModelTable.chunks
MOST_CHUNKS = 8
Cut = Literal["tokens", "commas", "words"]  # ModelTable.cut


class LoraTable(Table):
    """Low-rank adapters (LoRA): the weight W of every target becomes W + alpha / rank * up @ down."""

    rank: int = Field(4, ge=1)  # rank of the adapters of linear layers
    alpha: float | None = Field(None, gt=0)  # unset = rank, so that the factor alpha / rank is 1
    targets: list[str] = Field(["attention"], min_length=1)  # groups or names of linear layers, as in train without component
    conv: int = Field(0, ge=0)  # rank of the adapters of 3x3 convolutions; 0 = none
    conv_alpha: float | None = Field(None, gt=0)  # alpha of the adapters of 3x3 convolutions; unset = alpha, or else conv
    text_encoder: bool = False  # also add adapters to the targets in the text encoder
    file: PathText = ""  # start from this LoRA, a .safetensors file with the names of any tool

    @model_validator(mode="after")
    def _check_convolutions(self) -> LoraTable:
        if self.conv_alpha is not None and not self.conv:
            raise ValueError(f"conv_alpha is {self.conv_alpha:g} and conv is 0; set conv, the rank of 3x3 convolutions")
        return self


class ModelTable(Table):
    base: PathText  # diffusers folder, hub id, or one .safetensors in the original SD layout
    vae: PathText = ""  # folder, hub id or .safetensors file; "" = the VAE of the base
    tokenizer: PathText = ""  # folder or hub id; "" = the tokenizer of the base, but a single file has none
    revision: str = ""  # branch, tag or commit of a base on the hub; "" = its default branch
    vae_scaling_factor: float | None = Field(None, gt=0)  # only for a VAE file without a config
    clip_skip: int = Field(0, ge=0)  # 0 = use the last layer; n = use the n-th layer before it, then the final layer norm
    # 1 = cut captions at 75 tokens; n = encode n chunks of 75 tokens separately, also those that a caption leaves empty;
    # "auto" = encode as many as a caption fills, up to 3, as ComfyUI and A1111 do with a prompt
    chunks: Annotated[int, Field(ge=1, le=MOST_CHUNKS)] | Literal["auto"] = 1
    # Where a full chunk ends: "tokens" = after 75 tokens, as in ComfyUI; "commas" = after the last comma among the last 20 of
    # them, as in A1111; "words" = before a word of less than 8 tokens that does not fit, as in earlier versions of ComfyUI
    cut: Cut = "tokens"
    # What the UNet predicts from x_t; "" = as in the base. "flow" = a rectified flow: eps - x_0 at x_s = (1 - s) x_0 + s eps
    prediction: Literal["", "epsilon", "v_prediction", "flow"] = ""
    zero_snr: bool | None = None  # rescale the noise schedule so that it ends in pure noise; unset = as in the base
    # Shift of a flow's samples: k takes s in k s / (1 + (k - 1) s) in place of equal steps; unset = as in the base, or 1.0
    flow_shift: float | None = Field(None, gt=0)
    lora: LoraTable | None = None  # the table [model.lora]: adapters, which train = ["lora"] trains

    @model_validator(mode="after")
    def _check_prediction(self) -> ModelTable:
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError('prediction is "epsilon" and zero_snr is true; use "v_prediction" or zero_snr = false')
        if self.zero_snr is not None and self.prediction == "flow":
            raise ValueError('prediction is "flow", which has no noise schedule, and zero_snr is set; remove zero_snr')
        if self.flow_shift is not None and self.prediction not in ("", "flow"):
            raise ValueError(f'flow_shift is set and prediction is "{self.prediction}"; use "flow", or remove flow_shift')
        return self


class FolderTable(Table):
    path: str  # a folder, searched recursively; a .tar; a .parquet that lists images; or a pattern: {00000..00099}.tar
    repeats: int = Field(1, ge=1)  # number of times that each of its images occurs in an epoch
    weight: float | None = Field(None, gt=0)  # instead of repeats: share of an epoch, relative to the weights of other folders
    loss_weight: float = Field(1.0, ge=0)  # factor of the loss of each image


class BucketTable(Table):
    """Aspect-ratio buckets, with the keys and meanings of kohya's trainers."""

    min: int = Field(256, ge=8)  # px, shortest side of any bucket
    max: int = Field(1024, ge=8)  # px, longest side of any bucket
    step: int = Field(64, ge=8)  # px, all sides are multiples of it
    no_upscale: bool = False  # never enlarge images: small images get buckets of their own size

    @model_validator(mode="after")
    def _check_order(self) -> BucketTable:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max {self.max}; lower min or raise max")
        return self


def _check_sides(buckets: BucketTable, resolution: int) -> None:
    """Raise ValueError unless the sides of the buckets are multiples of their step and enclose the resolution."""
    step, reasons, advice = buckets.step, [], []
    if step > min(buckets.min, resolution):
        limit = "buckets.min" if buckets.min < resolution else "resolution"
        raise ValueError(f"buckets.step is {step}, above {limit} {min(buckets.min, resolution)}; lower it")
    low, high = min(buckets.min, resolution) // step * step, -(-max(buckets.max, resolution) // step) * step
    for key, side, usable in (("min", buckets.min, low), ("max", buckets.max, high)):
        if side != usable:
            beyond = f"above resolution {resolution}" if key == "min" else f"below resolution {resolution}"
            reasons.append(f"buckets.{key} is {side}, {f'not a multiple of step {step}' if side % step else beyond}")
            advice.append(f"buckets.{key} = {usable}")
    if reasons:
        raise ValueError(f"{', and '.join(reasons)}; use {' and '.join(advice)}")


class DataTable(Table):
    # Each entry is a path, { path = "...", repeats = 2 } or { path = "...", weight = 0.5 }. Captions lie in the folder's
    # metadata.jsonl, .parquet or .csv, beside their images (.txt or .caption), or in the tar.
    folders: list[str | FolderTable] = Field(min_length=1)
    resolution: int = Field(512, ge=8)  # px: side of the square, or square root of the largest bucket area
    crop: Literal["centre", "random"] = "centre"  # position of the square or bucket in the resized image
    crops: int = Field(1, ge=1, le=64)  # random crops stored per image; training picks one of them each time
    flip: bool = False  # also store mirrored latents; training picks one of the two each time
    buckets: BucketTable | None = None  # the table [data.buckets]: aspect-ratio buckets instead of squares
    latents: Literal["", "img_sdxl", "img_sdvae", "npz"] = ""  # "" = encode images; or import another trainer's latents
    # Source of captions: "file" = the metadata file that lists the image, or else the text beside it; "sidecar" = only the
    # text beside it; "filename" = its name without extension
    captions: Literal["file", "sidecar", "filename"] = "file"
    caption_key: str = ""  # key in metadata and .json; "" = the first of text, caption, prompt
    # Lines of a .txt or .caption: "variants" = each is a caption, and training picks one; "join" = all are one caption
    caption_lines: Literal["variants", "join"] = "variants"
    weight_key: str = ""  # key in metadata, whose value is a factor of the image's loss; "" = none
    masks: str = ""  # suffix of the masks beside images, such as "-mask.png"; white is learned; "" = none
    include: list[str] = []  # use only images with at least one of these tags
    exclude: list[str] = []  # use no image with any of these tags
    exclude_files: PathText = ""  # list of images that are not used, a text file with one path per line; "" = none

    @field_validator("folders")  # here, because a union of types would report a problem of a path once for each type
    @classmethod
    def _expand(cls, folders: list[str | FolderTable]) -> list[str | FolderTable]:
        tables = (
            folder if isinstance(folder, str) else folder.model_copy(update={"path": expanded(folder.path)})
            for folder in folders
        )
        return [expanded(folder) if isinstance(folder, str) else folder for folder in tables]

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
        if self.buckets:
            _check_sides(self.buckets, self.resolution)
        for root in self.roots:
            if root.weight is not None and root.repeats != 1:
                raise ValueError(f"folder {root.path} has repeats and weight; remove one of them")
        return self


class CacheTable(Table):
    dir: PathText = "cache"  # folder of the cache; runs may share it, because its keys include image, VAE and preprocessing
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # dtype of the stored latents; fp16 takes 32 KiB per image at 512 px
    precision: Literal["fp32", "bf16"] = "fp32"  # precision of the VAE encoder; SDXL's VAE would overflow in fp16
    batch: int = Field(8, ge=1)  # images per VAE call; an interruption can lose the work of one call
    workers: int = Field(0, ge=0)  # decoding threads; 0 = one per core
    # Also store the text embeddings of every caption, so that training needs no text encoder on the GPU. The stages may neither
    # train it nor edit captions. Takes 116 KiB per chunk of a caption in fp16. `precision` also applies to the text encoder
    hidden_states: bool = False


class PromptTable(Table):
    """A prompt with settings of its own. Those that are unset are as in `[sample]`."""

    prompt: str  # text of the prompt
    negative: str | None = None  # negative prompt
    width: int | None = Field(None, ge=1)  # px
    height: int | None = Field(None, ge=1)  # px
    seed: int | None = Field(None, ge=0, lt=2**64)  # seed of the first column
    steps: int | None = Field(None, ge=1)  # sampler steps
    guidance: float | None = Field(None, ge=0)  # classifier-free guidance scale; 1 = off


def _prompt_kind(prompt: object) -> str:
    return "str" if isinstance(prompt, str) else "table"


# Without the tags, pydantic would report a problem of a table once for each type.
Prompt = Annotated[Annotated[str, Tag("str")] | Annotated[PromptTable, Tag("table")], Discriminator(_prompt_kind)]


class SampleTable(Table):
    # One row of the grid per prompt. Each entry is a text, or a table with settings of its own, all of them optional:
    # { prompt = "a cat", negative = "blurry", width = 768, height = 512, seed = 5, steps = 30, guidance = 5.0 }
    prompts: list[Prompt] = []
    # File of more prompts, one per line, with options as in kohya's sd-scripts for width, height, seed, steps, guidance and
    # negative: a cat --w 768 --h 512 --d 5 --s 30 --l 5 --n blurry. Lines that start with # are comments
    prompts_file: PathText = ""
    negative: str = ""  # negative prompt, which replaces the empty prompt of the guidance
    images: int = Field(2, ge=1)  # columns of the grid: images per prompt, each with its own fixed seed
    seed: int = Field(0, ge=0, lt=2**64)  # seed of the first column; each further column adds 1
    # dpm++ is DPM++ 2M. Flows have euler, heun and dpm++; other models have all but heun
    sampler: Literal["ddim", "euler", "euler_a", "heun", "dpm++"] = "dpm++"
    steps: int = Field(20, ge=1)  # sampler steps
    guidance: float = Field(7.0, ge=0)  # classifier-free guidance scale; 1 = off
    # Share of the guided prediction whose spread is reduced to that of the prompt's; 0.7 for models with zero_snr, 0 = off
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    size: int = Field(0, ge=0)  # px, width and height; 0 = data.resolution
    width: int = Field(0, ge=0)  # px; 0 = size
    height: int = Field(0, ge=0)  # px; 0 = size
    # Weights that draw the grids of a run: "ema" = the EMA weights, in stages that have them
    weights: Literal["model", "ema"] = "model"


class ValidateTable(Table):
    """A loss for comparisons: it is always measured with the same images, noise and timesteps."""

    held_out: int = Field(0, ge=0)  # images that are never trained on; 0 = none
    stabilised: int = Field(0, ge=0)  # training images that are measured in the same way
    every: Amount = "1e"  # interval: steps, "1e", "30m"; also before the first step and at the end of each stage
    bands: int = Field(5, ge=1, le=100)  # equal ranges of timesteps, reported separately
    per_band: int = Field(2, ge=1)  # timesteps measured per image and band
    batch: int = Field(8, ge=1)  # images per forward
    seed: int = Field(0, ge=0, lt=2**63)  # seed of the choice of images, of noise and of timesteps
    # The choice, noise and timesteps of an image depend on `seed` and on: "content" = its latents, but not its path or other
    # images; "number" = its number in the cache, for data sets with corresponding images, such as those of `fastsd redraw`
    by: Literal["content", "number"] = "content"


class LogTable(Table):
    every: int = Field(10, ge=1)  # steps per log line; the step never waits, because values are read one line later
    tensorboard: bool = True  # event files under RUN/tensorboard; RUN/log.jsonl is always written
    wandb: str = ""  # project name; needs the extra: pip install "fastsd[wandb]"
    # Command that is run when a stage ends, the run finishes or an error ends it; "" = none. Its environment has FASTSD_EVENT,
    # FASTSD_RUN and FASTSD_MESSAGE: notify = 'mail -s "$FASTSD_MESSAGE" me@example.org < /dev/null'
    notify: str = ""


class ExportTable(Table):
    """Output of a run besides the diffusers folder RUN/model, which is always written, in fp32 as in the checkpoint."""

    single_file: bool = True  # also write RUN/model.safetensors in the original layout, for ComfyUI and A1111
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # dtype of that file
    fold: bool = True  # fold the VAE's scaling factor into its weights, because other tools assume 0.18215
    lora: Literal["kohya", "peft"] = (
        "kohya"  # names in lora.safetensors: kohya's, for all tools, or diffusers', not for ComfyUI
    )
    title: str = ""  # title in the files and the model card; "" = name of the run's folder
    author: str = ""  # author in the files and the model card; "" = none
    license: str = ""  # license in the same places, as the hub names it, such as "creativeml-openrail-m"; "" = none


class Config(Table):
    model: ModelTable
    data: DataTable
    stage: list[StageTable] = Field(min_length=1)
    cache: CacheTable = CacheTable()
    sample: SampleTable = SampleTable()
    validate_: ValidateTable = Field(ValidateTable(), alias="validate")
    log: LogTable = LogTable()
    export: ExportTable = ExportTable()
    run: PathText = "runs/run"  # folder of the run's files; the same command resumes from it
    seed: int = Field(0, ge=0, lt=2**63)  # seed of noise, timesteps, dropout and order
    kernels: Literal["auto", "triton", "reference"] = "auto"  # the Ops table; auto = the fastest for the device
    device: str = "auto"  # cpu, cuda or cuda:N; auto = cuda if available, otherwise cpu
    cuda_graph: bool = True  # replay the whole step as one CUDA graph on a GPU; the results are the same
    deterministic: bool = True  # resume exactly on a GPU; false = cuDNN times its algorithms at every start

    def stage_name(self, index: int) -> str:
        return self.stage[index].name or f"stage-{index + 1}"

    @model_validator(mode="after")
    def _check_hidden_states(self) -> Config:
        for i, stage in enumerate(self.stage if self.cache.hidden_states else ()):
            conflict = f"cache.hidden_states is true and stage {self.stage_name(i)!r}"
            if "text_encoder" in stage.train:
                raise ValueError(f"{conflict} trains the text encoder; set cache.hidden_states = false")
            for key in keys_with(StageTable, CAPTION):
                if getattr(stage, key):
                    raise ValueError(f"{conflict} edits captions by {key}; remove {key}, or set cache.hidden_states = false")
        return self

    @model_validator(mode="after")
    def _check_sampled_weights(self) -> Config:
        if self.sample.weights == "ema" and not any(stage.ema for stage in self.stage):
            raise ValueError('sample.weights is "ema" and no stage has ema; set ema in a stage, for example 0.9999')
        return self

    @model_validator(mode="after")
    def _check_canary(self) -> Config:
        for i, stage in enumerate(self.stage):
            if stage.canary_every and not self.deterministic:
                raise ValueError(
                    f"stage {self.stage_name(i)!r} has canary_every and deterministic is false, so that equal steps may differ"
                    "; set deterministic = true"
                )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Config:
        text_stage = ""  # the first that trains the text encoder
        for i, stage in enumerate(self.stage):
            name = self.stage_name(i)
            if "lora" in stage.train and self.model.lora is None:
                raise ValueError(f'stage {name!r} trains "lora" and [model.lora] is missing; add the table')
            if stage.state == "carry" and i == 0:
                raise ValueError(f'stage {name!r} has state = "carry" and is the first; remove state')
            adapts_text = "lora" in stage.train and self.model.lora is not None and self.model.lora.text_encoder
            text_stage = text_stage or (name if "text_encoder" in stage.components or adapts_text else "")
            if stage.teacher and text_stage:
                raise ValueError(
                    f"stage {name!r} has a teacher, and stage {text_stage!r} trains the text encoder; put the teacher before it"
                )
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
            raise ValueError("validate.every is set, but held_out and stabilised are 0; set validate.held_out, for example 16")
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


_LINE = re.compile(r"\(at line (\d+)")  # in the message of a `tomllib.TOMLDecodeError`
TABLES: dict[str, type[Table]] = {
    "model": ModelTable, "model.lora": LoraTable, "data": DataTable, "data.buckets": BucketTable, "cache": CacheTable,
    "sample.prompts": PromptTable, "sample": SampleTable, "validate": ValidateTable, "log": LogTable, "export": ExportTable,
    "stage": StageTable,
}  # fmt: skip


def load_config(path: str | Path, overrides: list[str] | None = None, precision: str | None = None) -> Config:
    """Read and check a config file.

    Args:
        path: the TOML file.
        overrides: `key=value` with a dotted key and a TOML value or bare word: `seed=7`, `model.vae=my-vae`,
            `stage.0.lr=1e-5` (by index), `stage.unet.batch=8` (by name), `stage.batch=8` (in every stage).
        precision: replaces the precision of every stage.

    Raises:
        UserError: the config is invalid. The message has one sentence per problem: file, field, value found, what to do.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            "config-missing", f"{path} does not exist; use the path of a .toml file, for example configs/xlsd.toml"
        ) from None
    except IsADirectoryError:
        raise UserError("config-is-folder", f"{path} is a folder; use the path of a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        advice = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "fix the file"
        line = _LINE.search(str(error))
        if line and "\\" in path.read_text(encoding="utf-8-sig").split("\n")[int(line[1]) - 1]:
            advice = "write paths with / or in 'single quotes', because a backslash in double quotes starts an escape"
        raise UserError("config-no-toml", f"{path} cannot be read as TOML ({error}); {advice}") from None
    for item in overrides or []:
        _override(raw, item)
    if precision is not None:
        _override(raw, f"stage.precision={precision}")
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str) -> Config:
    """Validate a parsed TOML dict. Raises UserError with one line per problem; each line starts with `source`."""
    problems = unknown_keys(raw, {field.alias or name for name, field in Config.model_fields.items()}, TABLES)
    try:
        config = Config.model_validate(raw, strict=True)
    except ValidationError as error:
        problems += [sentence(item) for item in error.errors() if item["type"] != "extra_forbidden"]
    if problems:
        invalid = UserError("config-invalid", "\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
        invalid.table = raw
        raise invalid
    return config


def dump_config(config: Config) -> str:
    """Serialise the resolved config, including defaults, as JSON with sorted keys."""
    return json.dumps(config.model_dump(by_alias=True), indent=2, sort_keys=True) + "\n"


def parse_value(text: str) -> Any:
    """Parse a value from the command line as TOML. Return the text unchanged if it is not TOML.

    Raises:
        UserError: a backslash keeps a list, a table or a quoted text from being TOML.
    """
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        if text.startswith(("[", "{", '"')) and "\\" in text:
            advice = "write paths with / or in 'single quotes', because a backslash in double quotes starts an escape"
            raise UserError("override-backslash", f"{text} is not a TOML value; {advice}") from None
        return text


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError("override-form", f"{item!r} is not an override; use key=value, for example stage.0.batch=8")
    value = parse_value(text)
    *parents, final_key = key.strip().split(".")
    targets: list[Any] = [raw]
    for segment in parents:
        targets = [child for target in targets for child in _descend(target, segment, key)]
    for target in targets:
        for table in target if isinstance(target, list) else [target]:
            table[final_key] = value


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
