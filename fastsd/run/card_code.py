"""Programs in model cards. With diffusers, they draw what fastsd draws from the same noise.

Any version of diffusers and transformers that fastsd supports runs them, and a test does. The prompts are encoded in the
program if clip skip or chunks are in use: `clip_skip` of diffusers fails with transformers 5, and with earlier versions it
applies to the positive prompt only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsd.config.schema import Chunks, Cut, SampleTable
from fastsd.model.flow_schedule import is_flow
from fastsd.model.formats.model_summary import ModelSummary, Samples
from fastsd.model.text_encoder import COMMA_TOKENS, LONG_WORD, chunk_limit, context_lengths
from fastsd.run.markdown import python_string
from fastsd.sampling.samplers import FLOW_SAMPLERS, SAMPLERS, sampler_options

_DEFAULTS, _PROMPT = SampleTable(), "a red fox in the snow"


def load_file(file: str, dtype: str, factor: float | None) -> str:
    """Return the lines that load a single file. `factor` is the VAE's scaling factor in the file, if not that of the folder."""
    source = f'{python_string(file)}, config="FOLDER"'
    lines = [f'pipe = StableDiffusionPipeline.from_single_file({source}).to("cuda", torch.{dtype})']
    lines += [f"pipe.vae.register_to_config(scaling_factor={factor})"] if factor is not None else []
    return "\n".join(lines)


def load_lora(file: str, base: str, dtype: str, *, other_vae: bool) -> str:
    """Return the lines that load a LoRA into its base model, whose VAE was replaced if `other_vae` is set."""
    lines = [f'pipe = StableDiffusionPipeline.from_pretrained({python_string(base)}).to("cuda", torch.{dtype})']
    if other_vae:
        lines.insert(0, "from diffusers import AutoencoderKL\n")
        lines.append(f'pipe.vae = AutoencoderKL.from_pretrained("FOLDER", subfolder="vae").to("cuda", torch.{dtype})')
    return "\n".join([*lines, f"pipe.load_lora_weights({python_string(file)})"])


def draw(summary: ModelSummary, dtype: str, window: int, config: Mapping[str, Any]) -> str:
    """Return the program that loads a folder and draws the first prompt of its samples with their settings.

    Args:
        summary: the model's summary; without samples, the defaults of a config are used.
        dtype: torch's name of a dtype.
        window: tokens that the text encoder reads at a time.
        config: the model's scheduler config.
    """
    settings = {"sampler", "steps", "guidance", "guidance_rescale"}
    samples = summary.samples or Samples(step=0, prompts=[], **_DEFAULTS.model_dump(include=settings))
    plain_prompts = [text for text in samples.prompts if " --" not in text]  # those without settings of their own
    prompt = python_string([*plain_prompts, *(text.partition(" --")[0] for text in samples.prompts), _PROMPT][0])
    flow = is_flow(config)
    scheduler = (FLOW_SAMPLERS if flow else SAMPLERS).get(samples.sampler, "")  # "" = an edited or newer summary's sampler
    width, height = samples.width or summary.resolution, samples.height or summary.resolution
    options = [f"num_inference_steps={samples.steps}, guidance_scale={samples.guidance:g}"]
    options += [f"guidance_rescale={samples.guidance_rescale:g}"] if samples.guidance_rescale else []
    options += [f"height={height}, width={width}"] if width and height else []
    negative = python_string(samples.negative)
    encode = _encode(summary.clip_skip or 0, summary.chunks, summary.cut, window)
    if encode:
        prompts = [f"prompt_embeds=encode({prompt})", f"negative_prompt_embeds=encode({negative})"]
    else:
        prompts = [prompt, *([f"negative_prompt={negative}"] if samples.negative else [])]
    call = "".join(f"    {argument},\n" for argument in [*prompts, *options])
    lines = ["import torch", f"from diffusers import {scheduler}{', ' * bool(scheduler)}StableDiffusionPipeline", ""]
    lines.append(f'pipe = StableDiffusionPipeline.from_pretrained("FOLDER").to("cuda", torch.{dtype})')
    if scheduler:
        options_of_class = sampler_options(samples.sampler, config).items()
        arguments = "".join(f", {key}={value!r}" for key, value in options_of_class if config.get(key) != value)
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler"{arguments})')
        if scheduler.startswith("FlowMatch"):
            lines.append("pipe.scheduler.init_noise_sigma = 1.0  # which the pipeline reads and the class lacks")
    else:
        lines.append(
            f"# The folder's own sampler. That of the samples is not available for this model: {python_string(samples.sampler)}"
        )
    return "\n".join([*lines, *encode, f"image = pipe(\n{call}).images[0]"])


# The lines that move the end of a full window in a program, as `text_encoder._end` does.
_CUTS = {
    "tokens": [],
    "commas": [
        'comma = tokenizer.convert_tokens_to_ids(",</w>")',
        "if end < len(ids) and ids[end] != comma:",
        f"    end = max((i + 1 for i in range(max(start, end - {COMMA_TOKENS}), end) if ids[i] == comma), default=end)",
    ],
    "words": [
        "if end < len(ids):",
        "    tokens = tokenizer.convert_ids_to_tokens(ids)",
        '    words = [i + 1 for i, token in enumerate(tokens) if token.endswith(("</w>", "|>"))]  # where they end',
        "    first = max((i for i in words if start < i <= end), default=end)",
        "    last = min((i for i in words if i > end), default=len(ids))",
        f"    end = first if last - first < {LONG_WORD} else end",
    ],
}


def _encode(clip_skip: int, chunks: Chunks, cut: Cut, window: int) -> Sequence[str]:
    """Return the lines of a function that encodes a prompt, or none if the pipeline encodes prompts in the same way."""
    in_windows, size, limit = chunks != 1 or cut != "tokens", window - 2, chunk_limit(chunks)
    if not clip_skip and not in_windows:
        return []
    if not in_windows:
        options = f'padding="max_length", truncation=True, max_length={window}, return_tensors="pt"'
        lines = [f"ids = pipe.tokenizer(text, {options}).input_ids"]
    else:
        more = f"len(windows) < {limit}"
        more += " and (start < len(ids) or not windows)" if chunks == "auto" else ""
        lines = [
            "tokenizer, windows, start = pipe.tokenizer, [], 0",
            "ids = tokenizer(text, add_special_tokens=False).input_ids",
            f"while {more}:",
            f"    end = start + {size}",
            *(f"    {line}" for line in _CUTS[cut]),
            "    chunk, start = ids[start:end], end",
            f"    padding = [tokenizer.pad_token_id] * ({size} - len(chunk))",
            "    windows.append([tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding])",
            "ids = torch.tensor(windows)",
        ]
    if clip_skip:
        lines += [
            'hidden_states = pipe.text_encoder(ids.to("cuda"), output_hidden_states=True).hidden_states',
            'encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)  # depends on the version of transformers',
            f"embeds = encoder.final_layer_norm(hidden_states[{-clip_skip - 1}])  # clip skip {clip_skip}",
        ]
    else:
        lines.append('embeds = pipe.text_encoder(ids.to("cuda")).last_hidden_state')
    if chunks == "auto":
        largest = context_lengths(1, chunks)[-1]
        lines.append(f"embeds = embeds.repeat({largest} // len(windows), 1, 1)  # one length for all prompts, the same result")
    lines.append("return embeds.flatten(0, 1)[None]" if in_windows else "return embeds")
    return ["", "", "@torch.no_grad()", "def encode(text):", *(f"    {line}" for line in lines), "", ""]
