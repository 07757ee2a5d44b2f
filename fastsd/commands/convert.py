"""`fastsd convert`: write a model as a diffusers folder, a single file, or a LoRA with kohya or PEFT names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from fastsd.config.schema import ModelTable
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.flow_schedule import is_flow
from fastsd.model.formats.adapters import ADAPTERS, MADE_BY, load_merged
from fastsd.model.formats.load import component_state_dict
from fastsd.model.formats.model_source import (
    ComponentFiles,
    ModelSource,
    check_component,
    locate,
    open_file,
    open_source,
    read_component,
)
from fastsd.model.formats.model_summary import ModelSummary, metadata_of, read_summary, summary_in
from fastsd.model.formats.write import check_folder_name, write_folder, write_single_file
from fastsd.run.checkpoint import averages_of, shortest_average
from fastsd.run.folder import resolve_model
from fastsd.run.model_card import SAMPLES, last_samples, summarize, write_card
from fastsd.run.other_programs import CHANNELS, sampling_notes
from fastsd.storage import TensorFile, new_folder
from fastsd.terminal.console import STDOUT, Console
from fastsd.terminal.texts import size_text

Origin = tuple[ModelSummary | None, Path | None]  # training summary and sample grid of a model


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of `convert`. Each is an option of the command line.

    Attributes:
        dtype: fp32, fp16 or bf16; "" = unchanged.
        ema: write the averaged (EMA) weights.
        fold: fold a scaling factor other than 0.18215 into the VAE of a single file.
        variant: a word in the names of a diffusers folder's weight files, such as fp16.
        shard: size in GiB above which a weight file of a diffusers folder is split; 0 = one file per component.
        vae, vae_scaling_factor, tokenizer, revision: as in `[model]` of a config.
        merge: adapters to merge into the weights, each LORA[:weight].
    """

    dtype: str = ""
    ema: bool = False
    fold: bool = True
    variant: str = ""
    shard: float = 0.0
    vae: str = ""
    vae_scaling_factor: float | None = None
    tokenizer: str = ""
    revision: str = ""
    merge: tuple[str, ...] = ()


def convert(name: str, out: Path, to: str = "", options: ConvertOptions | None = None, console: Console = STDOUT) -> None:
    """Write a model to `out` in another format, and print what was found and what was ignored.

    Only a block of one tensor is in memory at a time. EMA weights of a run and merged adapters need the whole model in memory.

    Args:
        name: a diffusers folder, hub id, single file (also `.ckpt` and `.bin`), LoRA file, run or checkpoint.
        to: diffusers, single-file, lora-kohya or lora-peft; "" = inferred from the ending of `out` and from `name`.

    Raises:
        UserError: the model is damaged or of another family, or `out` exists or cannot be written. No partial `out` is left.
    """
    options = options or ConvertOptions()
    to = to or _infer_format(name, out)
    if out.exists():
        kind = "folder" if to == "diffusers" else "file"
        raise UserError("convert-out-exists", f"OUT is {str(out)!r}, which already exists; choose a new {kind}")
    if to == "diffusers":
        check_folder_name(out, ", or for one file a name that ends in .safetensors")
    elif out.suffix != ".safetensors":
        raise UserError("convert-ending", f"OUT is {str(out)!r}, but --to is {to}; choose a name that ends in .safetensors")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if to.startswith("lora"):
            if options.merge:
                raise UserError("merge-into-lora", f"--to is {to}, but --merge needs a model; omit one of them")
            from fastsd.model.formats.lora_convert import convert_lora

            notes = convert_lora(_lora_file(name, ema=options.ema), out, to, options.dtype)
        else:
            source = _source(name, options)
            for note in source.notes:
                console.echo(note)
            notes = _write(source, _find_origin(name, source, options), out, to, options)
    except OSError as error:
        path, reason = error.filename or out, error.strerror or error
        raise UserError("convert-unwritable", f"{path}: {reason}; fix that and run again") from error
    for note in notes:
        console.echo(note)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    console.echo(f"{out}: {size_text(sum(path.stat().st_size for path in files))}, {to}")


def _infer_format(name: str, out: Path) -> str:
    if out.suffix != ".safetensors":
        return "diffusers"
    path = Path(name)
    tensor_names = TensorFile(path) if path.is_file() and path.suffix == ".safetensors" else ()
    others = [tensor for tensor in tensor_names if "lora" not in tensor]
    if len(others) < len(tensor_names) and all(name.endswith(".alpha") or name.startswith("bundle_emb.") for name in others):
        return "lora-peft" if any(tensor.startswith("lora_") for tensor in tensor_names) else "lora-kohya"
    return "single-file"


def _write(source: ModelSource, origin: Origin, out: Path, to: str, options: ConvertOptions) -> list[str]:
    summary, samples = origin
    if options.merge:
        adapters = ", ".join(f"{Path(text).name}" for text in options.merge)
        summary = summary or ModelSummary(title=out.stem)
        summary = summary.model_copy(update={"note": f"{summary.note} Adapters merged into the weights: {adapters}.".strip()})
    if to == "single-file":
        vae = source.components.get("vae")
        downscale = 2 ** (len(vae.config.get("block_out_channels", (64,))) - 1) if vae else 8
        size = (source.components["unet"].config.get("sample_size") or 64) * downscale
        metadata = metadata_of(summary, source.scheduler, size, title=out.stem)
        notes = write_single_file(source, out, dtype=options.dtype, fold=options.fold, metadata=metadata)
        return notes + _prediction_notes(source, out)
    with new_folder(out) as folder:
        shard = round(options.shard * (1 << 30))
        write_folder(source, folder, dtype=options.dtype, variant=options.variant, shard=shard)
        write_card(folder, summary or ModelSummary(title=out.name), samples=samples)
    return []


def _prediction_notes(source: ModelSource, out: Path) -> list[str]:
    """Return what other programs need in order to sample a model that does not predict epsilon, unless they cannot load it."""
    if source.components["unet"].config.get("out_channels", CHANNELS) != CHANNELS:
        return []
    kind = "flow" if is_flow(source.scheduler) else "v-prediction"
    programs = zip(("ComfyUI", "A1111"), sampling_notes(source.scheduler, out.name), strict=True)
    return [f"{kind}, {program}: {note.replace('*', '')}" for program, notes in programs for note in notes]


def _find_origin(name: str, source: ModelSource, options: ConvertOptions) -> Origin:
    """Find the training summary and the sample grid of a model. They come from its run, or are stored with the model."""
    run = Path(name) if (Path(name) / "checkpoints").is_dir() else None
    if run:
        run_summary = summarize(run, source.place, next(iter(averages_of(source.place)), "ema") if options.ema else "raw")
        return run_summary, last_samples(run, run_summary)
    samples = source.place / SAMPLES
    summary = summary_in(source.metadata) if source.place.is_file() else read_summary(source.place)
    return summary, samples if samples.is_file() else None


def _source(name: str, options: ConvertOptions) -> ModelSource:
    """Open the model to convert, or the newest checkpoint of a run. Its VAE is replaced by `--vae` if that is given."""
    base = resolve_model(name)
    load_whole = (Path(base) / MADE_BY).is_file() or (options.ema and Path(base).is_dir())
    source = open_source(
        base,
        revision=options.revision,
        pickled=True,
        ema=options.ema and not load_whole,
        tokenizer=options.tokenizer,
        omitted=("vae",) if options.vae else (),
    )
    if load_whole:
        source.components |= _load_components(Path(base), source, ema=options.ema)

    if options.vae:
        notes = source.notes
        path = locate(options.vae, "--vae", pickled=True)
        new_vae = open_file(path).read("vae", notes) if path.is_file() else read_component(path, "vae", notes, pickled=True)
        if new_vae is None:
            raise UserError("convert-no-vae", f"--vae is {options.vae!r}, which contains no VAE; give an AutoencoderKL")
        source.components["vae"] = check_component("vae", new_vae, notes)

    if options.merge:
        from fastsd.model.formats.merge import merge_into

        changed, notes = merge_into(source.components, options.merge)
        for component, tensors in changed.items():
            if tensors:
                files = source.components[component]
                source.components[component] = replace(files, tensors={**files.tensors, **tensors})
        source.notes += notes

    vae = source.components.get("vae")
    expected = source.components["unet"].config.get("out_channels", 4)
    if vae is not None and options.vae_scaling_factor is not None:
        source.components["vae"] = replace(vae, config={**vae.config, "scaling_factor": options.vae_scaling_factor})
    if vae is not None and (channels := vae.config.get("latent_channels", 4)) != expected:
        raise UserError(
            "convert-vae-channels",
            f"{vae.place}: latent_channels is {channels}, but the UNet has {expected}; give a VAE with {expected} latent "
            f"channels, or use `fastsd swap-vae {quote(base)} {quote(options.vae or 'VAE')} OUT`",
        )
    return source


def _load_components(checkpoint: Path, source: ModelSource, *, ema: bool) -> dict[str, ComponentFiles]:
    """Load a checkpoint's components with EMA weights or merged adapters, which its weight files do not contain."""
    averages = shortest_average(checkpoint) if ema else {}
    if ema and not averages:
        raise UserError("convert-no-ema", f"{checkpoint}: has no EMA weights; omit --ema")
    model = load_merged(ModelTable(base=str(checkpoint)), averages=averages)
    has_adapters = (checkpoint / MADE_BY).is_file()
    tensors = {name: component_state_dict(model, name, None if has_adapters else averages.get(name)) for name in COMPONENTS}
    source.notes.append(
        f"{checkpoint.name}: {'EMA weights' if ema else 'weights'}{', adapters merged' if has_adapters else ''}"
    )
    return {name: replace(source.components[name], tensors=tensors[name]) for name in COMPONENTS}


def _lora_file(name: str, *, ema: bool) -> Path:
    """Find the adapters to convert: a file, a PEFT folder, or the adapters of a run (of its newest checkpoint)."""
    path = Path(resolve_model(name))
    if ema:
        average = next(iter(averages_of(path)), "ema") if (path / ADAPTERS).is_file() else "ema"
        ema_path = Path(name) / f"lora-{average}.safetensors"
        if not ema_path.is_file():
            raise UserError(
                "convert-no-lora-ema",
                f"{name}: has no {ema_path.name}, which a run with EMA writes when it finishes; omit --ema",
            )
        return ema_path
    return path / ADAPTERS if (path / ADAPTERS).is_file() else path
