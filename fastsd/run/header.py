"""First lines of a run's output, for the user to check before leaving the run alone."""

from __future__ import annotations

from operator import mul

import torch

from fastsd.config.conversion import clip_skip_note
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import StageTable
from fastsd.config.stages import ENDLESS
from fastsd.run.live_line import legend
from fastsd.run.report import memory_gb
from fastsd.run.run import Run
from fastsd.terminal.texts import size_text
from fastsd.train.device import describe_ops
from fastsd.train.precision import COMPUTE_DTYPE


def header(run: Run) -> dict[str, str]:
    """Return the text of each header line by its title, in the order of output."""
    config, data, vae = run.config, run.data, run.model.vae
    meta, steps = data.latents.meta, run.position.steps
    lengths = [f"{n} steps" if n < ENDLESS else str(stage.until) for stage, n in zip(config.stage, steps, strict=True)]
    stages = [
        f"{config.stage_name(i)}: {_describe_stage(stage)}, {run.parameter_counts[i]:,} parameters, {lengths[i]}"
        for i, stage in enumerate(config.stage)
    ]
    images = len(data.latents)
    epochs = " or ".join(str(images_per_epoch) for images_per_epoch in dict.fromkeys(data.epochs))
    epoch = f", {epochs} per epoch" if epochs != str(images) else ""
    step = run.position.progress.step
    resumed = f", resumed at step {step}" if step else ""
    rejected = f", {meta.rejected} rejected" if meta.rejected else ""
    empty = f", {meta.empty_captions} empty captions" if meta.empty_captions else ""
    embeddings = ", with text embeddings" if data.text_embeddings else ""
    size_count = len({group.shape for group in data.latents.groups})
    sizes = f" in {size_count} sizes" if size_count > 1 else ""
    lines = {
        "run": f"{run.folder} ({', '.join(lengths)}{resumed})",
        "kernels": f"{describe_ops(run.ops)} on {_device_name(run.device)}, {size_text(memory_gb(run.device) * 1e9)} in use",
        "base": config.model.base,
        "vae": f"{config.model.vae or config.model.base}, {vae.channels} channels, {vae.latent_space}",
        "images": f"{images} at {config.data.resolution} px{sizes}{epoch}{empty}",
        "cache": f"{meta.cached} of {meta.images} images cached{rejected}{embeddings} ({config.cache.dir})",
        "stages": "\n".join(stages),
    }
    if (ranks := run.ranks).world > 1:
        sizes_sent = map(mul, run.parameter_counts, map(_sent_bytes, config.stage))
        sent = size_text(max(sizes_sent) * (ranks.world - 1) / ranks.world)
        lines["ranks"] = f"{ranks.world}, each with 1/{ranks.world} of a batch; each sends {sent} a step"
    if config.model.clip_skip:
        lines["text"] = clip_skip_note(config.model.clip_skip)
    lines["line"] = legend(
        stages=len(config.stage), tunes_lr=any(OPTIMIZERS[stage.optimizer].tunes_lr for stage in config.stage)
    )
    if data.sets.measured:
        lines["validation"] = f"{run.evaluation.validation}, every {config.validate_.every}"
    return lines


def _sent_bytes(stage: StageTable) -> int:
    """Return the bytes that ranks exchange for each parameter: its gradient, and its sum or, with sharded state, its weight."""
    return 4 + COMPUTE_DTYPE[stage.precision if stage.shard_state else "fp32"].itemsize


def _describe_stage(stage: StageTable) -> str:
    rates = "/".join(f"{stage.rate_of(component):g}" for component in (stage.lr if isinstance(stage.lr, dict) else [""]))
    micro_batch = f" (micro-batch {stage.micro_batch})" if stage.micro_batch else ""
    return f"{'+'.join(stage.train)} {stage.optimizer} lr {rates} {stage.precision}, batch {stage.batch}{micro_batch}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
