"""Model cards for exported folders: origin of the model, training, results, and how to load it.

    fastsd.json    the summary (`fastsd/model/formats/model_summary.py`), retained when the model is converted
    README.md      the card: YAML front matter for the hub, then text
    samples.png    the most recent sample grid

Paths are shortened to their last element, so a card can be published unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastsd import __version__
from fastsd.config.keys import COLUMN, NO_EFFECT, keys_with
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import Config, StageTable, parse_config
from fastsd.errors import UserError
from fastsd.model.flow_schedule import is_flow
from fastsd.model.formats.model_summary import (
    SUMMARY,
    Adapters,
    Change,
    Loss,
    ModelSummary,
    Samples,
    StageSummary,
    read_summary,
    weights_text,
)
from fastsd.model.latent_space import SD15_SCALING_FACTOR, LatentSpace
from fastsd.model.text_encoder import AUTO_CHUNKS
from fastsd.run import card_code
from fastsd.run.card_vae import CardVae
from fastsd.run.checkpoint import CONFIG, STATE
from fastsd.run.folder import Grid, grid_files, read_costs, read_grid, read_rows, read_table
from fastsd.run.license import license_of
from fastsd.run.markdown import code, inline, is_hub_id, link_or_code, table, yaml_string
from fastsd.run.other_programs import CHANNELS, lora_notes, other_channels, sampling_notes
from fastsd.run.restart import read_config
from fastsd.run.settings import flatten, setting_text
from fastsd.storage import copy_file, write_text

CARD, SAMPLES = "README.md", "samples.png"
WINDOW = 77  # context length of SD1.5's text encoder, in tokens
# Where the chunks of captions end, and how other tools cut a prompt without weights in the same places.
_CUTS = {
    "tokens": "Each chunk ends after {size} tokens, as in ComfyUI; in A1111, set *Prompt word wrap length limit* to 0.",
    "commas": "A full chunk ends at a comma among its last 20 tokens, as in A1111; ComfyUI cuts after {size} tokens.",
    "words": "A full chunk ends between words, as in earlier versions of ComfyUI; today's cuts after {size} tokens.",
}
# Run settings that affect the weights and contain no paths.
_RUN_SETTINGS: dict[str, Any] = {
    "data": {"crop", "crops", "flip", "buckets", "include", "exclude", "masks", "weight_key"}, "cache": {"dtype"},
}  # fmt: skip


def summarize(run: Path, checkpoint: Path, weights: str = "raw") -> ModelSummary:
    """Summarize a run up to one of its checkpoints.

    Args:
        run: the run's folder.
        checkpoint: one of its checkpoints.
        weights: the exported weights: "raw" or an average.

    Raises:
        UserError: the run's config.json is missing or invalid.
    """
    table = read_table(run / "config.json")
    if table is None:
        raise UserError(
            "run-config-unreadable",
            f"{run / 'config.json'}: missing or not readable as a config; delete it and run `fastsd train CONFIG` to write it",
        )
    config = parse_config(table, str(run / "config.json"))
    trained = read_config(checkpoint / CONFIG) or config  # the settings may have been changed after the last step
    state = read_table(checkpoint / STATE) or {}
    model, step = trained.model, state.get("step", 0)
    stages = _stages(run, trained, state)
    saved_at = datetime.fromtimestamp(int((checkpoint / STATE).stat().st_mtime), UTC)
    adapters = {"names": config.export.lora, "alpha": model.lora.alpha or model.lora.rank} if model.lora else {}
    lora = model.lora and Adapters.model_validate(model.lora.model_dump() | adapters)

    samples = None
    if grid := _last_grid(run, step, weights):
        prompts = list(dict.fromkeys(prompt for prompt, _ in grid.cells if prompt))
        sample, size = config.sample, config.sample.size or config.data.resolution
        settings = sample.model_dump(include={"sampler", "steps", "guidance", "guidance_rescale", "negative"})
        settings |= {"width": sample.width or size, "height": sample.height or size}
        samples = Samples(step=grid.step, prompts=prompts, **settings, weights=grid.weights)

    return ModelSummary(
        version=__version__,
        title=config.export.title or run.resolve().name + ("" if weights == "raw" else f"-{weights}"),
        date=saved_at.isoformat().replace("+00:00", "Z"),
        author=config.export.author,
        license=config.export.license,
        weights=weights,
        base=public_name(model.base),
        vae=public_name(model.vae or model.base),
        vae_factor=CardVae.of(checkpoint).space.factor,
        clip_skip=model.clip_skip,
        chunks=model.chunks,
        cut=model.cut,
        resolution=trained.data.resolution,
        seed=trained.seed,
        precision=", ".join(dict.fromkeys(precision for stage in stages for precision in _values(stage, "precision"))),
        steps=step,
        images=state["images"] - state.get("passed_over", 0) if "images" in state else None,
        dataset=(read_table(run / "images.json") or {}).get("samples"),
        stages=stages,
        settings=flatten(trained.model_dump(exclude_defaults=True, include=_RUN_SETTINGS)),
        validation=_losses(run, step),
        samples=samples,
        lora=lora,
    )


def untrained(title: str, base: str, vae: str = "", note: str = "") -> ModelSummary:
    """Return the summary of a model that was assembled, not trained. `note` explains how, in one or more sentences."""
    names = {"base": public_name(base), "vae": public_name(vae or base), "license": license_of(base)}
    return ModelSummary(version=__version__, title=title, note=note, **names)


def public_name(name: str) -> str:
    """Return a hub id unchanged. For a path, return the title of the model there, or the last element of the path."""
    path = Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name
    summary = read_summary(path)
    return summary.title if summary and summary.title else path.resolve().name


def last_samples(run: Path, summary: ModelSummary) -> Path | None:
    """Return the path of a run's most recent sample grid up to a model's step, or None. The model's own weights come first."""
    grid = _last_grid(run, summary.steps or 0, summary.weights)
    return grid.path if grid else None


def _last_grid(run: Path, step: int, weights: str) -> Grid | None:
    files = sorted(grid_files(run / "samples"), key=lambda f: (f[2], f[1].endswith(f"-{weights}"), f[0].name), reverse=True)
    return next((grid for file in files if file[2] <= step and (grid := read_grid(*file))), None)


def _stages(run: Path, config: Config, state: Mapping[str, Any]) -> list[StageSummary]:
    """Summarize the stages up to a checkpoint, in order. The steps and images of finished stages are read from cost.json."""
    costs = {row["name"]: row for row in read_costs(run)["stages"]}
    current_stage = state.get("stage", 0)
    not_listed = {*keys_with(StageTable, COLUMN), *keys_with(StageTable, NO_EFFECT)}
    summaries = []
    for i, stage in enumerate(config.stage[: current_stage + 1]):
        name = config.stage_name(i)
        totals = costs.get(name, {})
        if i == current_stage and state:
            totals = {"steps": state["stage_step"], "images": state["stage_step"] * stage.batch}
        columns = stage.model_dump(include={"train", "optimizer", "precision", "batch"})
        lr = stage.lr if isinstance(stage.lr, dict) else stage.rate_of("")
        settings = flatten(stage.model_dump(exclude_defaults=True, exclude=not_listed))
        counts = {key: totals.get(key) for key in ("steps", "images")}
        changes = [_change(change) for change in state.get("changes", []) if change["stage"] == i]
        summaries.append(StageSummary(name=name, lr=lr, settings=settings, changes=changes, **columns, **counts))
    return summaries


def _change(change: Mapping[str, Any]) -> Change:
    text = _rates if change["key"] == "lr" else setting_text
    return Change(step=change["step"], key=change["key"], before=text(change["before"]), after=text(change["after"]))


def _values(stage: StageSummary, key: str) -> list[str]:
    """Return the values of a setting over the steps of a stage. The last one is its field of the same name."""
    return [*(change.before for change in stage.changes if change.key == key), getattr(stage, key)]


def _losses(run: Path, step: int) -> list[Loss]:
    number = (int, float)
    rows = read_rows(run / "validation.jsonl", {"step": int, "set": str, "weights": str, "loss": number, "se": number})
    losses: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["step"] <= step:
            key = row["set"], row["weights"]
            first = {"first_step": row["step"], "first": row["loss"]}
            losses[key] = first | losses.get(key, {}) | row | {"last": row["loss"]}
    return [Loss.model_validate(row) for row in losses.values()]


def write_card(
    folder: Path, summary: ModelSummary, *, single: str = "", fold: bool = True, samples: Path | None = None
) -> None:
    """Write the summary, the card and the samples into a diffusers folder.

    Args:
        folder: the diffusers folder, complete except for these files.
        summary: summary of the model in the folder.
        single: name of a single file with the same weights, next to the folder; "" = no such file.
        fold: True if the single file has the VAE's scaling factor folded into its weights.
        samples: image for the card; None = the image in the folder, if there is one.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    if samples is not None:
        (folder / SAMPLES).unlink(missing_ok=True)
        copy_file(samples, folder / SAMPLES)
    write_text(folder / SUMMARY, json.dumps(summary.table(), indent=2, sort_keys=True) + "\n")
    write_text(folder / CARD, _Card(folder, summary, single, fold=fold).text())


class _Card:
    """The text of a card. It reads values such as the VAE's scaling factor from the configs in the folder."""

    def __init__(self, folder: Path, summary: ModelSummary, single: str, *, fold: bool) -> None:
        text = read_table(folder / "text_encoder" / "config.json") or {}
        scheduler = read_table(folder / "scheduler/scheduler_config.json") or {}
        self.summary, self.single, self.folded = summary, single, fold
        self.vae = CardVae.of(folder)
        self.window = text.get("max_position_embeddings", WINDOW)
        self.scheduler, self.flow = scheduler, is_flow(scheduler)
        self.v_prediction = scheduler.get("prediction_type") == "v_prediction"
        self.zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
        self.clip_skip, self.has_samples = summary.clip_skip or 0, (folder / SAMPLES).is_file()
        self.dtype = self.vae.dtype

    def text(self) -> str:
        title = f"# {inline(self.summary.title) or 'Stable Diffusion 1.5'}"
        sections = [self._front_matter(), title, self._opening(), self._facts()]
        sections += [self._samples(), self._training(), self._losses(), self._lora(), "## Usage", self._diffusers()]
        sections += [self._from_file(), *self._tools(), self._long_captions()]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _front_matter(self) -> str:
        summary, tags = self.summary, ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "fastsd"]
        tags += ["lora"] if summary.lora else []
        lines = ["library_name: diffusers", "pipeline_tag: text-to-image"]
        lines += [f"base_model: {summary.base}"] if is_hub_id(summary.base) else []
        lines += [f"license: {yaml_string(summary.license)}"] if summary.license else []
        return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])

    def _opening(self) -> str:
        summary = self.summary
        origin = f"{'trained' if summary.stages else 'made'} with fastsd {inline(summary.version)}".rstrip()
        author = f" by {inline(summary.author)}" if inline(summary.author) else ""
        swapped = f", with its VAE replaced by {link_or_code(summary.vae)}" if summary.vae not in ("", summary.base) else ""
        base = f" It is based on {link_or_code(summary.base)}{swapped}." if summary.base else ""
        note = f"\n\n{inline(summary.note)}" if summary.note else ""
        return f"A Stable Diffusion 1.5 model {origin}{author}.{base}{note}"

    def _facts(self) -> str:
        summary = self.summary
        vae = str(self.vae)
        if summary.vae:
            vae = f"{inline(summary.vae) if summary.vae != summary.base else 'same as base model'}, {vae}"
        chunks = f"up to {AUTO_CHUNKS}" if summary.chunks == "auto" else summary.chunks
        text = f"{self.window} tokens" if chunks == 1 else f"{chunks} chunks of {self.window} tokens"
        skip = f"clip skip {self.clip_skip} ({self.clip_skip + 1} in A1111)" if self.clip_skip else "no clip skip"
        v_prediction = "v_prediction, zero terminal SNR" if self.zero_snr else "v_prediction"
        weights = weights_text(summary.weights, "exponential moving average (EMA)") if summary.weights else ""
        rows = [
            ["Base model", inline(summary.base)],
            ["VAE", vae],
            ["Prediction type", "rectified flow" if self.flow else v_prediction if self.v_prediction else "epsilon"],
            ["Text encoder", f"{text}, {skip}"],
            ["Resolution", f"{summary.resolution} px" if summary.resolution else ""],
            ["Dataset", f"{_count(summary.dataset)} images" if summary.dataset else ""],
            ["Training", f"{_count(summary.steps)} steps, {_count(summary.images)} images seen" if summary.images else ""],
            ["Training precision", inline(summary.precision)],
            ["Weights", weights],
            ["Seed", "" if summary.seed is None else str(summary.seed)],
            ["Date", inline(summary.date[:10])],
        ]
        return table(["", ""], [row for row in rows if row[1]])

    def _samples(self) -> str:
        if not self.has_samples:
            return ""
        sections = ["## Samples", f"![samples]({SAMPLES})"]
        if samples := self.summary.samples:
            same = samples.weights == self.summary.weights or {samples.weights, self.summary.weights} <= {"model", "raw", ""}
            drawn = "non-EMA" if samples.weights == "model" else weights_text(samples.weights)
            weights = "" if same else f" with the {drawn} weights"
            settings = f"{inline(samples.sampler)} sampler, {samples.steps} steps, guidance scale {samples.guidance:g}"
            sections.append(f"Generated at step {_count(samples.step)}{weights}: {settings}.")
            sections.append("\n".join(f"- {inline(prompt)}" for prompt in samples.prompts))
        return "\n\n".join(sections)

    def _training(self) -> str:
        stages = self.summary.stages
        if not stages:
            return ""
        headings = ["Stage", "Trained", "Optimizer", "Learning rate", "Precision", "Batch size", "Steps", "Images"]
        rows, settings = [], {}
        for stage in stages:
            counts = f"{stage.batch}", _count(stage.steps), _count(stage.images)
            changed = _over_steps(stage.changes)
            columns = [stage.name, ", ".join(stage.train), stage.optimizer]
            columns += [changed.pop("lr", _rates(stage.lr)), changed.pop("precision", stage.precision)]
            settings[stage.name] = _settings_text(stage.settings | changed)
            rows.append([*map(inline, columns), *counts])
        notes = [f"- {inline(name)}: {text}" for name, text in settings.items() if text]
        notes += [f"- all stages: {_settings_text(self.summary.settings)}"] if self.summary.settings else []
        if any(optimizer.tunes_lr for name, optimizer in OPTIMIZERS.items() if name in {stage.optimizer for stage in stages}):
            notes.append("- D-Lion estimates its own step size; the learning rate is a factor applied to it")
        return "\n\n".join(["## Training", table(headings, rows), *(["\n".join(notes)] if notes else [])])

    def _losses(self) -> str:
        rows = []
        for loss in self.summary.validation:
            weights = weights_text(loss.weights)
            first = f"{loss.first:.4f} at step {_count(loss.first_step)}" if loss.first_step < loss.step else ""
            last = f"{loss.last:.4f} ± {loss.se:.4f} at step {_count(loss.step)}"
            rows.append([inline(loss.set.replace("_", " ")), inline(weights), first, last])
        method = (
            "Measured on the same images, noise and timesteps every time. Held-out images are never trained on; stabilised "
            "images are."
        )
        losses = table(["Set", "Weights", "First", "Last ± standard error"], rows)
        return "\n\n".join(["## Validation loss", method, losses]) if rows else ""

    def _lora(self) -> str:
        lora = self.summary.lora
        if lora is None:
            return ""
        components = "the UNet and the text encoder" if lora.text_encoder else "the UNet"
        settings = f"rank {lora.rank}, alpha {lora.alpha:g}, on {inline(', '.join(lora.targets))} of {components}"
        conv_alpha = f" and alpha {lora.conv_alpha:g}" if lora.conv_alpha else ""
        settings += f", rank {lora.conv}{conv_alpha} on 3x3 convolutions" if lora.conv else ""
        name = "lora.safetensors" if self.summary.weights in ("raw", "") else f"lora-{self.summary.weights}.safetensors"
        base = self.summary.base if is_hub_id(self.summary.base) else "BASE"
        other_vae = self.summary.vae not in ("", self.summary.base)
        load = card_code.load_lora(name, base, self.dtype, other_vae=other_vae)
        replaced = "the base model" if base == "BASE" else code(base)
        peft = lora.names == "peft"
        file = "the result of this command" if peft else "it"
        notes = lora_notes(self.scheduler, self.vae.channels, file, name if peft else "", other_vae=other_vae)
        if self.vae.channels == CHANNELS:
            notes = f"To apply it to {replaced}, {notes}"
        return _python(
            f"## LoRA\n\nTrained as a LoRA ({settings}) and merged into these weights. The LoRA alone is in `{name}`. {notes} "
            "In diffusers, replace the line `pipe = ...` of the program below by this:",
            load,
        )

    def _diffusers(self) -> str:
        program = card_code.draw(self.summary, self.dtype, self.window, self.scheduler)
        comment = f"; {self.vae.overflow} in float16" if self.vae.overflow else ""
        return _python(f"**Diffusers** (replace `FOLDER` with the path or Hub id of this model{comment}):", program)

    def _from_file(self) -> str:
        if not self.single:
            return ""
        folded = self.vae.has_other_factor and self.folded
        reason = (
            f", because the VAE's scaling factor {self.vae.factor:g} is folded into the weights of the file" if folded else ""
        )
        load = card_code.load_file(self.single, self.dtype, SD15_SCALING_FACTOR if folded else None)
        return _python(
            f"To load the single file {code(self.single)} instead, replace the line `pipe = ...` by this{reason}:", load
        )

    def _tools(self) -> list[str]:
        """Return instructions for ComfyUI and A1111, with every setting they cannot read from the file."""
        if sentence := other_channels(self.vae.channels):
            return [sentence]
        file = self.single or "model.safetensors"
        vae, notes = "The VAE is included", []
        if not self.single:
            notes.append(f"ComfyUI and A1111 load single files. Create one with {code(f'fastsd convert FOLDER {file}')}.")
        if self.single and self.vae.has_other_factor and not self.folded:
            notes.append(
                f"**{code(file)} gives wrong colours in ComfyUI and A1111**: they assume a VAE scaling factor of "
                f"{SD15_SCALING_FACTOR:g}, and this file needs {self.vae.factor:g}. `fastsd convert FOLDER OUT.safetensors` "
                "creates a file that works there."
            )
        elif self.vae.space != LatentSpace():
            vae += " and already scaled for SD1.5 tools"

        name = code(file)
        comfy = [f"copy {name} to `models/checkpoints` and load it with *Load Checkpoint*. {vae}; *Load VAE* is not needed."]
        webui = [f"copy {name} to `models/Stable-diffusion`. {vae}; leave *SD VAE* at Automatic or None."]
        if self.clip_skip:
            comfy.append(f"Add *CLIP Set Last Layer* with stop_at_clip_layer {-self.clip_skip - 1}.")
            webui.append(f"Set *Clip skip* to {self.clip_skip + 1}.")
        if self.vae.overflow:
            webui.append(f"If images are black, start with `--no-half-vae`, because {self.vae.overflow} in half precision.")
        comfy_notes, webui_notes = sampling_notes(self.scheduler, file)
        comfy, webui = comfy + comfy_notes, webui_notes if self.flow else webui + webui_notes
        if self.zero_snr:
            webui.append("If A1111 does not detect the noise schedule, set *Noise schedule for sampling* to Zero Terminal SNR.")
        return [*notes, f"**ComfyUI**: {' '.join(comfy)}", f"**A1111, Forge**: {' '.join(webui)}"]

    def _long_captions(self) -> str:
        """Return what to do for the reading of prompts that the captions of training had."""
        chunks, size, sentences = self.summary.chunks, self.window - 2, []
        if self.window > WINDOW:
            sentences.append(
                f"The text encoder has a context of {self.window} tokens instead of SD1.5's {WINDOW}. Tools written for "
                f"{WINDOW} tokens may fail to load its position embeddings, or truncate them."
            )
        if chunks != 1:
            limit = AUTO_CHUNKS if chunks == "auto" else chunks
            sentences.append(
                f"Trained on captions of up to {limit} chunks of {size} tokens, which are encoded separately and concatenated, "
                "and so are prompts in the program above. ComfyUI and A1111 encode the chunks that a prompt fills."
            )
            if chunks != "auto":
                sentences.append(
                    f"In training, captions that filled fewer than {limit} were completed with empty chunks. To do this with a "
                    "prompt and its negative prompt, ComfyUI: append one empty prompt for each missing chunk with "
                    "*Conditioning (Concat)*; A1111: end the prompt with one `BREAK` more than chunks are missing."
                )
            sentences.append(_CUTS[self.summary.cut].format(size=size))
        return " ".join(sentences)


def _python(text: str, program: str) -> str:
    return f"{text}\n\n```python\n{program}\n```"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _over_steps(changes: Iterable[Change]) -> dict[str, str]:
    """Format the values of each changed setting: "1e-05 until step 5,000, then 5e-06"."""
    texts, last = dict[str, list[str]](), dict[str, str]()
    for change in changes:
        texts.setdefault(change.key, []).append(f"{change.before} until step {_count(change.step)}")
        last[change.key] = change.after
    return {key: ", ".join([*texts[key], f"then {value}"]) for key, value in last.items()}


def _rates(lr: float | Mapping[str, float]) -> str:
    return f"{lr:g}" if isinstance(lr, (int, float)) else ", ".join(f"{component} {rate:g}" for component, rate in lr.items())


def _settings_text(settings: Mapping[str, str]) -> str:
    return inline(", ".join(f"{key} = {value}" for key, value in settings.items()))
