"""Export of a run's newest checkpoint for other tools. Every start of a finished run writes these files again.

RUN/model               a diffusers folder in fp32, which shares no file with the checkpoint, with its model card
RUN/model.safetensors   the same model in one file of the original layout, for ComfyUI and A1111
RUN/lora.safetensors    the adapters alone, if the run trains adapters; RUN/model has them merged
RUN/model-ema ...       all of the above with EMA weights, if the checkpoint has any (RUN/model-ema-0.05 for an average of that
                        relative length)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType

from fastsd.config.schema import Config
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.adapters import Averages, write_lora_file
from fastsd.model.formats.model_source import ModelSource, read_component
from fastsd.model.formats.model_summary import ModelSummary, metadata_of
from fastsd.model.formats.write import write_single_file
from fastsd.model.model import Model
from fastsd.run import checkpoint
from fastsd.run.license import license_note
from fastsd.run.model_card import last_samples, summarize, write_card
from fastsd.storage import new_file, remove_folder
from fastsd.terminal.console import Console
from fastsd.terminal.texts import WARNING, size_text


def check_export(config: Config, model: Model) -> None:
    """Raise UserError if the config's single file could not hold the model's VAE."""
    space, table = model.vae.latent_space, config.export
    if table.single_file and not table.fold and not space.is_scaled_only:
        raise UserError(
            "export-fold-shift",
            f"export.fold is false, and the VAE has {space}, which no loader of single files reads; set export.fold = true or "
            "export.single_file = false",
        )


def export_newest(config: Config, model: Model, console: Console) -> Path:
    """Export the newest checkpoint of `config.run`, which holds `model`. Each path written is reported to `console`.

    Return the path to share, without EMA: the LoRA file if there is one, otherwise the single file, otherwise the folder.

    Raises:
        UserError: the single file's dtype cannot represent a value.
        OSError: the disk is full or the folder is not writable.
    """
    newest = checkpoint.checkpoints(Path(config.run) / "checkpoints")[-1]
    averages = checkpoint.averages_of(newest)
    export_path = _export(config, newest, model, console)
    if note := license_note(config):
        console.echo(f"note: {note}")
    for name, tensors in averages.items():
        _export(config, newest, model, console, name, tensors)
    _remove_averages(Path(config.run), averages, console)
    return export_path


def _remove_averages(run: Path, current: Collection[str], console: Console) -> None:
    """Delete the EMA exports of an earlier stage: beside the model of a later one, they would look like its averages."""
    for path in sorted([*run.glob("model-ema*"), *run.glob("lora-ema*")]):
        if path.name.removesuffix(".safetensors").partition("-")[2] in current:
            continue
        if path.is_dir():
            remove_folder(path)
        elif path.exists():
            path.unlink()
        else:
            continue
        if not path.exists():
            console.echo(f"removed: {path}, of an earlier stage; the newest checkpoint has no such weights")


def _export(
    config: Config, newest: Path, model: Model, console: Console, average: str = "", averages: Averages = MappingProxyType({})
) -> Path:
    run, suffix = Path(config.run), average and f"-{average}"
    summary = summarize(run, newest, average or "raw")
    lora_file = run / f"lora{suffix}.safetensors"
    return write_outputs(config, newest, model, summary, run / f"model{suffix}", lora_file, averages, console)


def write_outputs(
    config: Config,
    newest: Path,
    model: Model,
    summary: ModelSummary,
    folder: Path,
    lora_file: Path,
    averages: Averages,
    console: Console,
) -> Path:
    """Write a checkpoint's model to `folder`, to a single file beside it, and its adapters to `lora_file`, if it has any.

    Args:
        summary: of the model card.
        averages: component name -> tensors by parameter name that replace those of the checkpoint.

    Raises:
        UserError, OSError: as `export_newest`.
    """
    run, table, single_file = Path(config.run), config.export, folder.with_name(f"{folder.name}.safetensors")
    single_name = single_file.name if table.single_file else ""
    samples = last_samples(run, summary)

    def finish(new: Path) -> None:
        try:
            write_card(new, summary, single=single_name, fold=table.fold, samples=samples)
        except OSError:
            raise  # the disk is full: nothing else can be written either
        except Exception as error:
            console.warn(f"model card of {folder} not written: {type(error).__name__}: {error}")

    def metadata(*, lora: bool = False) -> dict[str, str]:
        return metadata_of(summary, model.scheduler, model.unet.cfg.sample_size * model.vae.downscale, lora=lora)

    checkpoint.export(newest, folder, model, averages, finish)
    outputs = [(folder, "diffusers folder in fp32")]
    if not table.single_file:
        single_file.unlink(missing_ok=True)  # an older file would not match the weights in the folder
    else:
        components = {name: read_component(folder, name) for name in (*COMPONENTS, "vae")}  # just written, so not verified
        source = ModelSource(folder, components, model.scheduler, None)
        notes = write_single_file(source, single_file, dtype=table.dtype, fold=table.fold, metadata=metadata())
        warnings = [note for note in notes if note.startswith(WARNING)]
        remarks = [note for note in notes if note not in warnings]
        outputs.append((single_file, "; ".join([f"single file in {table.dtype}", *remarks])))
        for warning in warnings:
            console.echo(warning)
    if model.lora is not None:
        with new_file(lora_file) as temporary:
            write_lora_file(temporary, model, averages, table.lora, metadata(lora=True))
        outputs.append((lora_file, f"adapters with {table.lora} names"))

    for path, description in outputs:
        console.echo(f"model: {path}, {size_text(bytes_of(path))}, {description}")
    return outputs[-1][0]


def bytes_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
