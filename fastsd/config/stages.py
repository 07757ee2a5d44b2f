"""Schema and defaults of a `[[stage]]` in a config: what to train, for how long and with which objective."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fastsd.config.keys import CAPTION, COLUMN, FIXED, FREE, LIGHT, NO_EFFECT, NOISE, Only, conditions
from fastsd.config.optimizers import OPTIMIZERS, OptimizerName

Precision = Literal["fp32", "tf32", "bf16"]
Rate = Annotated[float, Field(gt=0)]
LONGEST = 0.2886  # largest sigma_rel: 1/sqrt(12) is that of a uniform average
Amount = int | str  # a number of steps, epochs or images, or a time (see `parse_amount`)
COMPONENTS = ("unet", "text_encoder")
ENDLESS = 1 << 40  # number of steps of a stage that ends by time
AVERAGES = 4  # most averages that a stage keeps
UNTIMED = ("keep_every", "checkpoint_at")  # keys whose amounts must not be times, so that `fastsd plan` knows what they take


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _checked_ema(ema: Any) -> Any:
    """Check `ema`, of which pydantic would report every problem once for each of its types."""
    if not isinstance(ema, dict):
        if isinstance(ema, (int, float)) and not isinstance(ema, bool) and 0 <= ema < 1:
            return ema
        raise ValueError(f"{ema!r} is not a decay from 0 to below 1; use for example 0.9999, or {{ sigma_rel = [0.05, 0.10] }}")
    if other_keys := [key for key in ema if key != "sigma_rel"]:
        raise ValueError(
            f"the table has {other_keys[0]!r}; use {{ sigma_rel = [0.05, 0.10] }} alone, or a decay such as 0.9999"
        )
    lengths = ema.get("sigma_rel")
    if not isinstance(lengths, list) or not 1 <= len(lengths) <= AVERAGES:
        raise ValueError(f"sigma_rel is {lengths!r}; use one to {AVERAGES} lengths, for example [0.05, 0.10]")
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not 0 < length <= LONGEST:
            raise ValueError(f"sigma_rel has {length!r}; use numbers above 0 and at most {LONGEST}, that of a uniform average")
    names = [f"{length:g}" for length in lengths]
    if doubled := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"sigma_rel has {doubled[0]} twice; remove one")
    return ema


class StageTable(Table):
    name: Annotated[str, FREE | LIGHT | COLUMN] = ""  # name of the stage in logs, checkpoints and overrides; "" = stage-N
    # What to train; everything else is frozen and costs nothing. "unet", "text_encoder", "lora" (the adapters of [model.lora]),
    # a group of a component (unet.attention, unet.cross_attention, unet.norms, unet.in, unet.mid, unet.out, unet.conv_in, ...)
    # or parameter names as in diffusers, with * as wildcard: "unet.up_blocks.3.*", "text_encoder.layers.11"
    train: Annotated[list[str], FIXED | COLUMN] = Field(min_length=1)
    # Length of this stage: 1000 or "1000 steps" | "2e" or "2 epochs" | "64000 images" | "90m" or "12 hours"
    until: Annotated[Amount, FREE | LIGHT | COLUMN]
    # What the stage takes over from the previous one: "reset" = the weights; "carry" = also the optimizer state, d and EMA
    state: Annotated[Literal["reset", "carry"], FIXED | LIGHT] = "reset"
    reinit: Annotated[list[str], FIXED | LIGHT] = []  # parameters that start from new random weights, named as in train
    precision: Annotated[Precision, FREE | COLUMN] = "fp32"  # of the computation; a change loses no bit of the weights
    batch: Annotated[int, FIXED | COLUMN] = Field(32, ge=1)  # images per optimizer step
    # Images per forward, a divisor of batch; gradients are accumulated. 0 = batch, "auto" = the largest that fits
    micro_batch: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], FREE | LIGHT | NO_EFFECT] = 0
    # Recomputation in the backward. "ff" recomputes the first matmul of the feed-forwards and saves a third of the memory.
    # "block" recomputes everything: it needs very little memory and a third more time. `fastsd plan` prints the figures.
    checkpointing: Annotated[Literal["none", "ff", "block"], FREE | NO_EFFECT] = "none"
    # Update each parameter when its gradient arrives, without memory for gradients. Needs micro_batch = batch, no grad_clip
    fused_backward: Annotated[bool, FREE | NO_EFFECT] = False
    # Several GPUs: each keeps the optimizer state and the EMA of its share of the weights only (ZeRO-1)
    shard_state: Annotated[bool, FREE | NO_EFFECT] = False

    optimizer: Annotated[OptimizerName, FIXED | COLUMN] = "dlion"  # dlion finds the step size itself
    # One lr, or { unet = 1e-6, text_encoder = 3e-6 }. lion and adamw need it. For dlion it is a factor of d, 1.0 by default
    lr: Annotated[Rate | dict[Literal["unet", "text_encoder"], Rate] | None, FREE | LIGHT | COLUMN] = None
    # dlion and lion (0.9, 0.99), adamw (0.9, 0.999)
    betas: Annotated[list[float] | None, FIXED | LIGHT] = Field(None, min_length=2, max_length=2)
    weight_decay: Annotated[float, FREE | LIGHT] = Field(0.0, ge=0)  # decoupled: a step subtracts lr * weight_decay * weight
    # lion: decay by weight_decay * lr / initial lr, as in lion-pytorch
    decoupled_weight_decay: Annotated[bool, FIXED | LIGHT, Only(optimizer="lion")] = False
    d0: Annotated[float, FIXED] = Field(1e-6, gt=0)  # dlion: first estimate of the step size
    # dlion: largest factor by which d grows per step, for example 1.02
    growth_rate: Annotated[float | None, FREE, Only(optimizer="dlion")] = Field(None, gt=1)
    d_max: Annotated[float | None, FREE, Only(optimizer="dlion")] = Field(None, gt=0)  # dlion: upper limit of d
    # dlion: d is constant after this many steps of the stage; 0 = never constant
    freeze_d_after: Annotated[int, FREE, Only(optimizer="dlion")] = Field(0, ge=0)
    # Schedule of lr after the warm-up
    schedule: Annotated[Literal["constant", "linear", "cosine", "rex"], FREE | LIGHT] = "constant"
    # rex: how late lr falls. 0.5 = as in the paper, 0.9 = as in OneTrainer, 0 = linear
    rex_bend: Annotated[float, FREE | LIGHT, Only(schedule="rex")] = Field(0.5, ge=0, lt=1)
    lr_floor: Annotated[float, FREE | LIGHT] = Field(0.0, ge=0, le=1)  # final value of the schedule, as a share of lr
    # Restarts of the schedule, in cycles of equal length
    restarts: Annotated[int, FREE | LIGHT, Only(schedule=("linear", "cosine", "rex"))] = Field(0, ge=0)
    # Steps, or a fraction of the stage when below 1 (0.1 = the first 10 %)
    warmup: Annotated[int | float, FREE | LIGHT] = Field(0, ge=0)
    grad_clip: Annotated[float, FREE] = Field(0.0, ge=0)  # largest gradient norm over all trained parameters; 0 = no clipping
    # Decay of the EMA of the weights, which starts with the stage; 0 = no EMA. Without a warm-up, 0.9999 keeps 74 % of the
    # starting weights for 3,000 steps; diffusers and OneTrainer always warm up. { sigma_rel = [0.05, 0.10] } keeps up to four
    # averages, whose lengths are these shares of the steps done, and never holds the starting weights; other lengths can then
    # be made by `fastsd average`
    ema: Annotated[float | dict[Literal["sigma_rel"], list[float]], BeforeValidator(_checked_ema), FREE] = 0.0
    # EMA warm-up: the decay in step n is at most 1 - (1 + n)^-power, as with use_ema_warmup in diffusers: 0.67 for a million
    # steps, 0.75 for some ten thousand; 0 = none
    ema_power: Annotated[float, FREE] = Field(0.0, ge=0)
    ema_after: Annotated[int, FREE] = Field(0, ge=0)  # steps during which the EMA equals the weights
    # sigma_rel: copies of the averages that the stage stores at equal intervals, for `fastsd average`; 0 = none. The more, the
    # closer; 16 give lengths between and near those of two averages within 1 %
    ema_snapshots: Annotated[int, FREE | LIGHT | NO_EFFECT] = Field(16, ge=0)
    # dtype of these copies; the averages themselves are fp32, in training and in checkpoints
    ema_snapshot_dtype: Annotated[Literal["fp16", "bf16", "fp32"], FREE | LIGHT | NO_EFFECT] = "fp16"

    # "huber" is PyTorch's and half of "mse" for small errors. "pseudo_huber" is huber of sd-scripts with a constant huber_c;
    # its smooth_l1 is the same divided by huber_c
    loss: Annotated[Literal["mse", "mae", "huber", "pseudo_huber"], FREE] = "mse"
    # huber and pseudo_huber: quadratic below this error, linear above; huber_c of sd-scripts, where it is 0.1 by default
    huber_delta: Annotated[float, FREE | LIGHT, Only(loss=("huber", "pseudo_huber"))] = Field(1.0, gt=0)
    weighting: Annotated[Literal["none", "min_snr", "debiased", "p2"], FREE] = "none"  # loss weights of timesteps
    # Form of the weights. "paper" = those of the papers, which are for epsilon. For v-prediction, they are converted through
    # x_0, so that debiased and p2 fall towards pure noise. With "sd-scripts" (no p2) and "onetrainer" they rise there, as these
    # trainers have them. min_snr is the same in all of them
    weighting_form: Annotated[
        Literal["paper", "sd-scripts", "onetrainer"], FREE | LIGHT, Only(weighting=("min_snr", "debiased", "p2"))
    ] = "paper"
    # Smallest weight, e.g. 0.1 for zero_snr, where min_snr and all weights of the papers are 0 at the last timestep, from which
    # sampling starts
    weighting_min: Annotated[float, FREE | LIGHT, Only(weighting=("min_snr", "debiased", "p2"))] = Field(0.0, ge=0)
    # By default 5.0 for min_snr and 1.0 for p2
    weighting_gamma: Annotated[float | None, FREE | LIGHT, Only(weighting=("min_snr", "p2"))] = Field(None, gt=0)
    # Standard deviation of noise constant over a channel, e.g. 0.05 to 0.1
    noise_offset: Annotated[float, FREE | NOISE] = Field(0.0, ge=0, le=1)
    # Factor of noise at half resolution, squared at a quarter, ...; e.g. 0.3. In multires_noise of sd-scripts, sizes are random
    # and fall faster, so that the same factor gives low frequencies of up to twice the strength
    pyramid_noise: Annotated[float, FREE | NOISE] = Field(0.0, ge=0, lt=1)
    # Additional noise in the input, not in the target; e.g. 0.1
    input_perturbation: Annotated[float, FREE | NOISE] = Field(0.0, ge=0, le=1)
    # Noises drawn per image, of which the nearest is used; 1 = plain noise
    immiscible: Annotated[int, FREE | NOISE] = Field(1, ge=1, le=64)
    timesteps: Annotated[Literal["uniform", "logit_normal", "cubic"], FREE] = "uniform"  # distribution of the timesteps
    # First and end; the end is excluded
    timestep_range: Annotated[list[int], FREE | LIGHT] = Field([0, 1000], min_length=2, max_length=2)
    # logit_normal: above 0 favours noisy timesteps, below 0 the others
    timestep_mean: Annotated[float, FREE | LIGHT, Only(timesteps="logit_normal")] = 0.0
    # logit_normal: spread of the timesteps
    timestep_std: Annotated[float, FREE | LIGHT, Only(timesteps="logit_normal")] = Field(1.0, gt=0)
    # Flows only: moves the drawn s in [0, 1] to k s / (1 + (k - 1) s), which favours noise if k > 1; 3.0 as for SD3
    timestep_shift: Annotated[float, FREE | LIGHT] = Field(1.0, gt=0)
    # Flows only: "base" = learn the flow that model.base, which predicts epsilon or v, knows already, instead of the images'.
    # In the first stage, two layers are also fitted to that flow before the first step. It needs a forward of the base in
    # each step, and memory for its weights as far as this or an earlier stage trains them
    teacher: Annotated[Literal["", "base"], FREE] = ""
    # Share of the teacher in the target; the rest is the images'. With the mse, this is the same as two weighted losses
    teacher_share: Annotated[float, FREE | LIGHT, Only(teacher="base")] = Field(1.0, gt=0, le=1)
    # Loss weight where a mask (data.masks) is black. Grey lies between it and 1 in proportion. In OneTrainer, dark grey is
    # raised to this weight, and all else has the weight of its grey
    unmasked_weight: Annotated[float, FREE | LIGHT] = Field(0.0, ge=0, le=1)

    caption_dropout: Annotated[float, FREE | LIGHT] = Field(0.0, ge=0, le=1)  # share of captions replaced by ""
    max_tags: Annotated[int, FREE | LIGHT | CAPTION] = Field(0, ge=0)  # keep the first n tags of a caption; 0 = all
    tag_separator: Annotated[str, FREE | LIGHT] = Field(",", min_length=1)  # between tags; also joins edited ones
    shuffle_tags: Annotated[bool, FREE | LIGHT | CAPTION] = False  # put tags in random order
    keep_tags: Annotated[int, FREE | LIGHT] = Field(0, ge=0)  # neither shuffle nor drop the first n tags
    tag_dropout: Annotated[float, FREE | LIGHT | CAPTION] = Field(0.0, ge=0, le=1)  # share of the tags that are dropped
    # Put sentences, which end with full stops, in random order
    shuffle_sentences: Annotated[bool, FREE | LIGHT | CAPTION] = False

    # Interval of sample grids: steps, "1e", "30m"; 0 = only at the stage's end
    sample_every: Annotated[Amount, FREE | LIGHT | NO_EFFECT] = 0
    # Interval of checkpoints, same units; the stage's end always has one
    checkpoint_every: Annotated[Amount, FREE | LIGHT | NO_EFFECT] = 1000
    # Newest checkpoints to keep, besides the last healthy one, stage ends, keep_every, checkpoint_at and requests
    keep_checkpoints: Annotated[int, FREE | LIGHT | NO_EFFECT] = Field(3, ge=1)
    # Interval of checkpoints that are never deleted: 50000, "10e", "1000000 images"; 0 = none
    keep_every: Annotated[Amount, FREE | LIGHT | NO_EFFECT] = 0
    # Single checkpoints that are never deleted: ["1e", "10e", 5000]
    checkpoint_at: Annotated[list[Amount], FREE | LIGHT | NO_EFFECT] = []
    # Steps between checks of the hardware: a step's gradients are computed twice and compared bit by bit; 0 = no checks
    canary_every: Annotated[int, FREE | NO_EFFECT] = Field(0, ge=0)

    @property
    def components(self) -> list[str]:
        """Components named in `train`. "lora" adds none, because its components depend on the model."""
        return list(dict.fromkeys(entry.split(".")[0] for entry in self.train if entry != "lora"))

    @property
    def sigma_rel(self) -> list[float]:
        """Relative lengths of the power-function averages (see `fastsd.train.averages`). Empty if there are none."""
        return self.ema.get("sigma_rel", []) if isinstance(self.ema, dict) else []

    @property
    def averages(self) -> list[str]:
        """Names of the averages of the weights that the stage keeps, for logs, files and checkpoints: "ema", "ema-0.05"."""
        return [f"ema-{sigma:g}" for sigma in self.sigma_rel] if isinstance(self.ema, dict) else ["ema"] * (self.ema > 0)

    @property
    def seconds(self) -> float | None:
        """Duration of the stage in seconds if `until` is a time, otherwise None."""
        amount, unit = parse_amount("until", self.until)
        return amount if unit == "seconds" else None

    def rate_of(self, component: str) -> float:
        """Return the lr of a trained component. The default is 1.0, of an optimizer that tunes its lr."""
        lr = self.lr[component] if isinstance(self.lr, dict) else self.lr  # type: ignore[index]
        return 1.0 if lr is None else lr

    @property
    def micro_batch_size(self) -> int:
        """Images per forward. "auto" counts as the whole batch until a run resolves it."""
        return self.batch if self.micro_batch in (0, "auto") else int(self.micro_batch)

    def steps(self, images_per_epoch: int) -> int:
        """Return the number of steps of this stage: `until` in steps, rounded up, or `ENDLESS` if it is a time."""
        steps = steps_of("until", self.until, self.batch, images_per_epoch)
        return ENDLESS if steps is None else steps

    def warmup_steps(self, total: int) -> int:
        return int(self.warmup * total) if 0 < self.warmup < 1 else int(self.warmup)

    @model_validator(mode="after")
    def _check_train(self) -> StageTable:
        for key, lora in (("train", '"lora", '), ("reinit", "")):
            for entry in getattr(self, key):
                if entry != "lora" and entry.split(".")[0] not in COMPONENTS:
                    raise ValueError(f'{key} has {entry!r}; use {lora}"unet", "text_encoder" or a group such as "unet.mid"')
        if "lora" in self.reinit:
            raise ValueError('reinit has "lora", which every run initialises; remove it')
        if len(set(self.train)) != len(self.train):
            raise ValueError(f"train is {self.train}; remove the duplicate")
        for component in COMPONENTS:
            groups = [entry for entry in self.train if entry.startswith(f"{component}.")]
            if component in self.train and groups:
                raise ValueError(f"train has {component!r}, which includes {groups[0]!r}; remove one of them")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> StageTable:
        if self.lr is None and not OPTIMIZERS[self.optimizer].tunes_lr:
            raise ValueError(f"lr is missing and {self.optimizer} needs it; add lr, for example 3e-6")
        if isinstance(self.lr, dict):
            needed = set(self.components) | ({"unet"} if "lora" in self.train else set())
            if not needed <= set(self.lr) or ("lora" not in self.train and set(self.lr) - needed):
                raise ValueError(f"lr has keys {list(self.lr)} and train is {self.train}; set one lr per trained component")

        if self.d_max is not None and self.d_max < self.d0:
            raise ValueError(f"d_max is {self.d_max:g}, below d0 {self.d0:g}; raise d_max or lower d0")

        if self.fused_backward and (self.batch != self.micro_batch_size or self.micro_batch == "auto" or self.grad_clip):
            option = "grad_clip" if self.grad_clip else "micro_batch"
            raise ValueError(f"fused_backward is true, which does not work with {option}; remove one of them")
        if self.fused_backward and self.canary_every:
            raise ValueError("canary_every is set and fused_backward is true, which keeps no gradients; remove one of them")
        if self.batch % self.micro_batch_size:
            divisor = max(n for n in range(1, min(self.micro_batch_size, self.batch) + 1) if self.batch % n == 0)
            raise ValueError(f"micro_batch is {self.micro_batch}, not a divisor of batch {self.batch}; use {divisor}")

        if self.betas and not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas is {list(self.betas)}; use two numbers of at least 0 and below 1")
        return self

    @model_validator(mode="after")
    def _check_averages(self) -> StageTable:
        key = "ema_power" if self.ema_power else "ema_after" if self.ema_after else ""
        if key and not self.ema:
            raise ValueError(f"{key} is set and ema is 0; set ema, for example 0.9999")
        if key and self.sigma_rel:
            raise ValueError(f"{key} is set and ema has sigma_rel, whose averages need no warm-up; remove {key}")
        for key in ("ema_snapshots", "ema_snapshot_dtype"):
            if getattr(self, key) != StageTable.model_fields[key].default and not self.sigma_rel:
                raise ValueError(
                    f"{key} is set and ema is not a table; set ema = {{ sigma_rel = [0.05, 0.10] }}, or remove {key}"
                )
        return self

    @model_validator(mode="after")
    def _check_length(self) -> StageTable:
        amount, unit = parse_amount("until", self.until)
        if unit == "steps" and self.warmup_steps(int(amount)) > amount:
            raise ValueError(f"warmup is {self.warmup:g} steps and the stage has {amount:g}; lower it, or use a fraction: 0.1")
        if unit == "seconds" and (self.schedule != "constant" or 0 < self.warmup < 1):
            option = f"schedule {self.schedule!r}" if self.schedule != "constant" else f"warmup {self.warmup:g}"
            raise ValueError(f"until is {self.until!r}, but {option} needs a number of steps; use steps, epochs or images")
        for key in ("sample_every", "checkpoint_every", "keep_every"):
            if getattr(self, key) != 0 or key == "checkpoint_every":
                parse_amount(key, getattr(self, key))
        for key, values in (("keep_every", [self.keep_every]), ("checkpoint_at", self.checkpoint_at)):
            for value in values:
                if (key, value) != ("keep_every", 0) and parse_amount(key, value)[1] == "seconds":
                    raise ValueError(f"{key} has {value!r}; use steps, epochs or images")
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> StageTable:
        first, end = self.timestep_range
        if not 0 <= first < end:
            raise ValueError(f"timestep_range is {[first, end]}; use [first, end] with 0 <= first < end")
        if self.weighting == "p2" and self.weighting_form == "sd-scripts":
            raise ValueError('weighting_form is "sd-scripts", which has no p2; use "onetrainer" or "paper"')
        return self

    @model_validator(mode="after")
    def _check_conditions(self) -> StageTable:
        for key, only in conditions(StageTable).items():
            value = getattr(self, only.option)
            if value not in only.values and getattr(self, key) != StageTable.model_fields[key].default:
                raise ValueError(
                    f"{key} is set and {only.option} is {value!r}; use {' or '.join(only.values)}, or remove {key}"
                )
        return self


_UNITS = {
    "": ("steps", 1), "step": ("steps", 1), "e": ("epochs", 1), "epoch": ("epochs", 1), "image": ("images", 1),
    "s": ("seconds", 1), "second": ("seconds", 1), "m": ("seconds", 60), "min": ("seconds", 60), "minute": ("seconds", 60),
    "h": ("seconds", 3600), "hour": ("seconds", 3600), "d": ("seconds", 86400), "day": ("seconds", 86400),
}  # fmt: skip


def parse_amount(key: str, amount: Amount) -> tuple[float, str]:
    """Parse `1000`, `"1000 steps"`, `"2e"`, `"1.5 epochs"`, `"64000 images"`, `"90m"` or `"12 hours"`.

    Returns:
        (number, unit). The unit is "steps", "epochs", "images" or "seconds". Steps and images are whole numbers.

    Raises:
        ValueError: `amount` has another form or is not above 0. The message names `key`.
    """
    match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*([a-z]*)\s*", str(amount).lower())
    word = match[2] if match else "?"
    unit, factor = _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or ("", 0)
    if not match or not unit or not 0 < float(match[1]) < ENDLESS or ("." in match[1] and unit in ("steps", "images")):
        time = "" if key in UNTIMED else ' or a time ("12h")'
        raise ValueError(f'{key} is {amount!r}; use steps (1000), epochs ("2e"), images ("64000 images"){time}, above 0')
    return float(match[1]) * factor, unit


def steps_of(key: str, amount: Amount, batch: int, images_per_epoch: int) -> int | None:
    """Convert an amount to steps of `batch` images, rounded up to at least 1. Return None for a time."""
    number, unit = parse_amount(key, amount)
    if unit == "seconds":
        return None
    images = number * {"steps": batch, "epochs": images_per_epoch, "images": 1}[unit]
    return max(-(-round(images) // batch), 1)
