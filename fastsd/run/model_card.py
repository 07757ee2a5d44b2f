"""Model cards for exported folders: origin of the model, training, results, and how to load it.

    fastsd.json    the summary (`fastsd/model/formats/model_summary.py`), retained when the model is converted
    README.md      the card: YAML front matter for the hub, then text
    samples.png    the most recent sample grid

Paths are shortened to their last element, so a card can be published unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastsd import __version__
from fastsd.config.schema import Config, parse_config
from fastsd.errors import UserError
from fastsd.model.formats.fold_vae import SD15_SCALING_FACTOR
from fastsd.model.formats.model_summary import SUMMARY, Adapters, Loss, ModelSummary, Samples, StageSummary, read_summary
from fastsd.run.checkpoint import STATE
from fastsd.run.folder import Grid, grid_files, read_grid, read_rows, read_table
from fastsd.run.settings import setting_text
from fastsd.storage import link_or_copy, write_text

CARD, SAMPLES = "README.md", "samples.png"
SDXL_SCALING_FACTOR = 0.13025
WINDOW = 77  # context length of SD1.5's text encoder, in tokens
# Stage settings that are columns of the card's table, and those that do not affect the weights.
_TOLD = {"name", "train", "optimizer", "lr", "precision", "batch", "until"}
_NO_MATTER = {"micro_batch", "checkpointing", "fused_backward", "sample_every", "checkpoint_every", "keep_checkpoints",
              "checkpoint_at"}  # fmt: skip
# Run settings that affect the weights and contain no paths.
_OF_RUN: dict[str, Any] = {
    "data": {"crop", "crops", "flip", "buckets", "include", "exclude", "masks", "weight_key"}, "cache": {"dtype"},
}  # fmt: skip


def summarize(run: Path, checkpoint: Path, weights: str = "raw") -> ModelSummary:
    """Summarize a run up to one of its checkpoints.

    Args:
        run: the run's folder.
        checkpoint: one of its checkpoints.
        weights: the exported weights: "raw", or "ema" for their exponential moving average.

    Raises:
        UserError: the run's config.json is missing or invalid.
    """
    table, state = read_table(run / "config.json"), read_table(checkpoint / STATE) or {}
    if table is None:
        raise UserError(
            "run-config-unreadable",
            f"{run / 'config.json'}: cannot be read as a run's config; start the run again, which writes it",
        )
    config = parse_config(table, str(run / "config.json"))
    model, stages, step = config.model, _stages(run, config, state), state.get("step", 0)
    grid, adapters = _last_grid(run, step), model.lora
    written = datetime.fromtimestamp(int((checkpoint / STATE).stat().st_mtime), UTC)
    return ModelSummary(
        version=__version__, title=config.export.title or run.resolve().name + ("-ema" if weights == "ema" else ""),
        date=written.isoformat().replace("+00:00", "Z"), author=config.export.author, license=config.export.license,
        weights=weights, base=called(model.base), vae=called(model.vae or model.base),
        vae_factor=(read_table(checkpoint / "vae/config.json") or {}).get("scaling_factor"),
        clip_skip=model.clip_skip, chunks=model.chunks, resolution=config.data.resolution, seed=config.seed,
        precision=", ".join(dict.fromkeys(stage.precision for stage in stages)), steps=step, images=state.get("images"),
        dataset=(read_table(run / "images.json") or {}).get("samples"), stages=stages,
        settings=_flat(config.model_dump(exclude_defaults=True, include=_OF_RUN)), validation=_losses(run, step),
        samples=grid and Samples(
            step=grid.step, prompts=list(dict.fromkeys(prompt for prompt, _ in grid.cells if prompt)),
            **config.sample.model_dump(include={"sampler", "steps", "guidance"}),
        ),
        lora=adapters and Adapters.model_validate(adapters.model_dump() | {"alpha": adapters.alpha or adapters.rank}),
    )  # fmt: skip


def untrained(title: str, base: str, vae: str = "", note: str = "") -> ModelSummary:
    """Return the summary of a model that was assembled, not trained. `note` explains how, in one or more sentences."""
    return ModelSummary(version=__version__, title=title, base=called(base), vae=called(vae or base), note=note)


def called(name: str) -> str:
    """Return a model's public name: a hub id unchanged; for a path, the title of the model there or the last path element."""
    path = Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name
    summary = read_summary(path)
    return summary.title if summary and summary.title else path.resolve().name


def last_samples(run: Path, step: int) -> Path | None:
    """Return the path of a run's most recent sample grid up to a step, or None."""
    grid = _last_grid(run, step)
    return grid.path if grid else None


def _last_grid(run: Path, step: int) -> Grid | None:
    files = sorted(grid_files(run / "samples"), key=lambda file: (file[2], file[0].name), reverse=True)
    return next((grid for file in files if file[2] <= step and (grid := read_grid(*file))), None)


def _stages(run: Path, config: Config, state: Mapping[str, Any]) -> list[StageSummary]:
    """Summarize the stages trained up to a checkpoint, in order. Finished stages take steps and images from cost.json."""
    costs = {row["name"]: row for row in (read_table(run / "cost.json") or {}).get("stages", [])}
    current_stage, rows = state.get("stage", 0), []
    for i, stage in enumerate(config.stage[: current_stage + 1]):
        name = config.stage_name(i)
        done = costs.get(name, {})
        if i == current_stage and state:
            done = {"steps": state["stage_step"], "images": state["images"] - state["stage_images"]}
        rows.append(StageSummary(
            name=name, train=stage.train, optimizer=stage.optimizer, precision=stage.precision, batch=stage.batch,
            lr=stage.lr if isinstance(stage.lr, dict) else stage.rate_of(""),
            steps=done.get("steps"), images=done.get("images"),
            settings=_flat(stage.model_dump(exclude_defaults=True, exclude=_TOLD | _NO_MATTER)),
        ))  # fmt: skip
    return rows


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": setting_text(value)}
    return flat


def _losses(run: Path, step: int) -> list[Loss]:
    number = (int, float)
    rows = read_rows(run / "validation.jsonl", {"step": int, "set": str, "weights": str, "loss": number, "se": number})
    losses: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["step"] <= step:
            first = {"first_step": row["step"], "first": row["loss"]}
            losses[row["set"], row["weights"]] = (
                first | losses.get((row["set"], row["weights"]), {}) | row | {"last": row["loss"]}
            )
    return [Loss.model_validate(row) for row in losses.values()]


def write_card(
    folder: Path, summary: ModelSummary, *, single: str = "", fold: bool = True, samples: Path | None = None
) -> None:
    """Write the summary, the card and the samples into a diffusers folder.

    Args:
        folder: complete except for these files.
        summary: summary of the model in it.
        single: name of a single file with the same weights, next to the folder; "" = there is no such file.
        fold: True if the single file has the VAE's scaling factor folded into its weights.
        samples: image for the card; None = use the one in the folder.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    if samples is not None:
        (folder / SAMPLES).unlink(missing_ok=True)
        link_or_copy(samples, folder / SAMPLES)
    write_text(folder / SUMMARY, json.dumps(summary.table(), indent=2, sort_keys=True) + "\n")
    write_text(folder / CARD, _Card(folder, summary, single, fold).text())


class _Card:
    """Text of a card. Values in the folder's configs, such as the VAE's scaling factor, are read from there."""

    def __init__(self, folder: Path, summary: ModelSummary, single: str, fold: bool) -> None:
        vae, text = (read_table(folder / part / "config.json") or {} for part in ("vae", "text_encoder"))
        scheduler = read_table(folder / "scheduler/scheduler_config.json") or {}
        self.told, self.single, self.fold = summary, single, fold
        self.channels, self.factor = vae.get("latent_channels", 4), vae.get("scaling_factor", SD15_SCALING_FACTOR)
        self.window = text.get("max_position_embeddings", WINDOW)
        self.velocity = scheduler.get("prediction_type") == "v_prediction"
        self.zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
        self.skip, self.sampled = summary.clip_skip or 0, (folder / SAMPLES).is_file()
        self.foreign = self.factor != SD15_SCALING_FACTOR  # other tools would scale its latents incorrectly
        self.overflows = self.factor == SDXL_SCALING_FACTOR

    def text(self) -> str:
        parts = [self._front(), f"# {self.told.title or 'Stable Diffusion 1.5'}", self._opening(), self._facts()]
        parts += [self._samples(), self._training(), self._losses(), self._lora(), "## How to load it", self._diffusers()]
        parts += [self._from_file(), *self._tools(), self._long()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front(self) -> str:
        summary = self.told
        tags = [
            "stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "fastsd", *(["lora"] if summary.lora else []),
        ]  # fmt: skip
        lines = ["library_name: diffusers", "pipeline_tag: text-to-image"]
        lines += [f"base_model: {summary.base}"] if "/" in summary.base else []
        lines += [f"license: {json.dumps(summary.license)}"] if summary.license else []
        return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])

    def _opening(self) -> str:
        summary = self.told
        origin = f"{'trained' if summary.stages else 'made'} with fastsd {summary.version}".rstrip()
        author = f" by {summary.author}" if summary.author else ""
        swapped = f", with {_linked(summary.vae)} in place of its VAE" if summary.vae not in ("", summary.base) else ""
        start = f" It starts from {_linked(summary.base)}{swapped}." if summary.base else ""
        note = f"\n\n{summary.note}" if summary.note else ""
        return f"A model of Stable Diffusion 1.5's family, {origin}{author}.{start}{note}"

    def _facts(self) -> str:
        summary = self.told
        predicts = "v, with a noise schedule that ends in pure noise" if self.zero_snr else "v"
        vae = f"{self.channels} channels, scaling factor {self.factor:g}"
        vae += f" (SD1.5's is {SD15_SCALING_FACTOR:g})" if self.foreign else ""
        text = f"{self.window} tokens" if summary.chunks == 1 else f"{summary.chunks} chunks of {self.window} tokens"
        vae_name = summary.vae if summary.vae != summary.base else "the base's"
        skip = f"clip skip {self.skip} ({self.skip + 1} where the last layer counts as 1)" if self.skip else "no clip skip"
        rows = {
            "Base": summary.base, "VAE": f"{vae_name}, {vae}" if summary.vae else vae,
            "Predicts": predicts if self.velocity else "noise (epsilon)", "Text encoder": f"{text}, {skip}",
            "Resolution": f"{summary.resolution} px" if summary.resolution else "",
            "Images seen": f"{_counted(summary.images)}, in {_counted(summary.steps)} steps" if summary.images else "",
            "Data set": f"{_counted(summary.dataset)} images" if summary.dataset else "",
            "Weights": {"raw": "as trained", "ema": "their exponential moving average"}.get(summary.weights, ""),
            "Precision": f"trained in {summary.precision}" if summary.precision else "",
            "Seed": "" if summary.seed is None else str(summary.seed), "Date": summary.date[:10],
        }  # fmt: skip
        return _table(["", ""], [[name, value] for name, value in rows.items() if value])

    def _samples(self) -> str:
        if not self.sampled:
            return ""
        parts, drawn = ["## Samples", f"![samples]({SAMPLES})"], self.told.samples
        if drawn:
            raw = ", with the weights as trained instead of their average" if self.told.weights == "ema" else ""
            how = (
                f"Drawn at step {_counted(drawn.step)}{raw}: {drawn.sampler}, {drawn.steps} steps, guidance {drawn.guidance:g}."
            )
            parts += [how, "\n".join(f"- {' '.join(prompt.split())}" for prompt in drawn.prompts)]
        return "\n\n".join(parts)

    def _training(self) -> str:
        stages = self.told.stages
        if not stages:
            return ""
        heads = ["stage", "trained", "optimizer", "lr", "precision", "batch", "steps", "images"]
        rows = [
            [s.name, ", ".join(s.train), s.optimizer, _rates(s.lr), s.precision, f"{s.batch}", _counted(s.steps),
             _counted(s.images)]
            for s in stages
        ]  # fmt: skip
        notes = [f"- {s.name}: {_listed(s.settings)}" for s in stages if s.settings]
        notes += [f"- all stages: {_listed(self.told.settings)}"] if self.told.settings else []
        if any(s.optimizer == "dlion" for s in stages):
            notes.append("- D-Lion finds its step size by itself; lr is a factor on it")
        return "\n\n".join(["## Training", _table(heads, rows), *(["\n".join(notes)] if notes else [])])

    def _losses(self) -> str:
        rows = [
            [loss.set.replace("_", " "), {"raw": "as trained", "ema": "average"}.get(loss.weights, loss.weights),
             f"{loss.first:.4f} at step {_counted(loss.first_step)}" if loss.first_step < loss.step else "",
             f"{loss.last:.4f} ± {loss.se:.4f} at step {_counted(loss.step)}"]
            for loss in self.told.validation
        ]  # fmt: skip
        how = "Of the same images, noise and timesteps every time; held-out images were never trained on, stabilised ones were."
        table = _table(["set", "weights", "first", "last ± standard error"], rows)
        return "\n\n".join(["## Validation loss", how, table]) if rows else ""

    def _lora(self) -> str:
        lora = self.told.lora
        if lora is None:
            return ""
        conv = f"; rank {lora.conv} in 3x3 convolutions" if lora.conv else ""
        text = ", of the text encoder as well" if lora.text_encoder else ""
        size = f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}{text}{conv}"
        name = "lora-ema.safetensors" if self.told.weights == "ema" else "lora.safetensors"
        return (
            f"## LoRA\n\nTrained as a LoRA ({size}) and merged into these weights. By itself it is `{name}`, for the base: "
            "`pipe.load_lora_weights` in diffusers, `models/loras` in ComfyUI, `models/Lora` in A1111."
        )

    def _diffusers(self) -> str:
        drawn = self.told.samples
        prompt = json.dumps(drawn.prompts[0] if drawn and drawn.prompts else "a red fox in the snow", ensure_ascii=False)
        kind, why = ("bfloat16", "  # SDXL's VAE overflows in float16") if self.overflows else ("float16", "")
        skip = f", clip_skip={self.skip}" if self.skip else ""
        how = f"num_inference_steps={drawn.steps}, guidance_scale={drawn.guidance:g}" if drawn else "num_inference_steps=25"
        return "\n".join([
            "**diffusers**, with FOLDER for this folder or its id on the hub:", "", "```python", "import torch",
            "from diffusers import StableDiffusionPipeline", "",
            f'pipe = StableDiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.{kind}).to("cuda"){why}',
            f"image = pipe({prompt}, {how}{skip}).images[0]", "```",
        ])  # fmt: skip

    def _from_file(self) -> str:
        if not self.single:
            return ""
        how = "with SD1.5's configs, which it takes from the hub"
        if self.foreign and self.fold:
            how += f"; not with this folder's, since in the file the VAE's factor {self.factor:g} is part of its weights"
        elif self.foreign:
            how = f'with `config="FOLDER"`, which tells it the VAE\'s factor {self.factor:g}'
        scheduler = 'DDIMScheduler.from_pretrained("FOLDER", subfolder="scheduler")'
        hint = f" Give it `scheduler={scheduler}`: the file alone does not tell that it predicts v." if self.velocity else ""
        return f"`StableDiffusionPipeline.from_single_file` reads `{self.single}`, {how}.{hint}"

    def _tools(self) -> list[str]:
        """Return instructions for ComfyUI and A1111, with every setting they cannot read from the file."""
        if self.channels != 4:
            return [
                f"**ComfyUI, A1111** take SD1.5's latents to have 4 channels and cannot load this model of {self.channels}."
            ]
        file, parts = self.single or "model.safetensors", []
        if not self.single:
            parts.append(f"ComfyUI and A1111 read single files: `fastsd convert FOLDER {file}` makes one.")
        elif self.foreign and not self.fold:
            parts.append(
                f"**`{file}` does not have the factor {self.factor:g} folded in, so ComfyUI and A1111, which take it to be "
                f"{SD15_SCALING_FACTOR:g}, show wrong colours.** `fastsd convert FOLDER OUT.safetensors` makes one that they "
                "show right."
            )
        note = "Its own VAE is in it, scaled as the tool expects" if self.foreign else "Its own VAE is in it"
        comfy = [f"put `{file}` into `models/checkpoints` and load it with *Load Checkpoint*. {note}; no *Load VAE* is needed."]
        webui = [f"put `{file}` into `models/Stable-diffusion`. {note}: leave *SD VAE* at Automatic or None."]
        if self.skip:
            comfy.append(f"Clip skip: *CLIP Set Last Layer* with stop_at_clip_layer {-self.skip - 1}.")
            webui.append(f"Set *Clip skip* to {self.skip + 1}.")
        if self.overflows:
            webui.append("If pictures come out black, start it with `--no-half-vae`: SDXL's VAE overflows in half precision.")
        if self.velocity:
            snr = str(self.zero_snr).lower()
            comfy.append(f"It takes SD1.5's models to predict noise: add *ModelSamplingDiscrete*, v_prediction, zsnr {snr}.")
            webui.append(
                "It takes SD1.5's models to predict noise: put a copy of its `configs/v1-inference.yaml` beside the file as "
                f'`{Path(file).stem}.yaml`, with `parameterization: "v"` added under `model`, `params`.'
            )
        if self.zero_snr:
            webui.append("Where it overlooks the noise schedule, set *Noise schedule for sampling* to Zero Terminal SNR.")
        return [*parts, f"**ComfyUI**: {' '.join(comfy)}", f"**A1111, Forge**: {' '.join(webui)}"]

    def _long(self) -> str:
        if self.window > WINDOW:
            return (
                f"The text encoder reads {self.window} tokens at once, where SD1.5's reads {WINDOW}: tools made for {WINDOW} "
                "may refuse its table of positions, or cut it."
            )
        if self.told.chunks > 1:
            return (
                f"It was trained on captions of up to {self.told.chunks} times {self.window - 2} tokens, encoded one after the "
                f"other. ComfyUI and A1111 read long prompts in the same way; diffusers cuts them at {self.window - 2}."
            )
        return ""


def _counted(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _rates(lr: float | Mapping[str, float]) -> str:
    return f"{lr:g}" if isinstance(lr, (int, float)) else ", ".join(f"{part} {rate:g}" for part, rate in lr.items())


def _listed(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in settings.items())


def _linked(name: str) -> str:
    """Format a hub id as a link and any other name as code."""
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
