"""Load a model in one program and compute what `clients.py` compares: `PYTHON client_adapters.py CLIENT JOB.json RESULT`.

The file runs in the environment of each program, so it imports nothing of fastsd at the top. A job names a diffusers folder, a
single file and perhaps a LoRA, and a file of inputs. The result has these tensors, as far as the program gives them out:

    conditioning    the text embeddings of `ids`, (1, L, D)
    eps             the output of the UNet, whatever it predicts, for `x`, `t` and `context`, (1, C, H, W)
    image           one step from `noise` at the last timestep, for `empty_ids`, decoded, (3, R, R), 0 to 1

Shapes: L tokens, D width of the embeddings, C channels, H x W latent positions, R pixels.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

NOT_READ = 3  # exit status for a product that the program does not claim to read
Job = dict[str, Any]
Arrays = dict[str, np.ndarray]
ALPHAS_OF_SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tensors_of(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(job["inputs"]))


def denoised(alpha: Any, x: Any, output: Any, *, v_prediction: bool) -> Any:
    """Return the denoised latents. `alpha` is the cumulative product of 1 - beta; Salimans and Ho 2022, appendix D."""
    a, s = alpha**0.5, (1 - alpha) ** 0.5
    return a * x - s * output if v_prediction else (x - s * output) / a


def fastsd(job: Job) -> Arrays:
    """Ours, the values to which all others are compared. The LoRA is merged by `convert`'s formulas, in fp64."""
    import torch
    from diffusers import DDIMScheduler

    import fastsd
    from fastsd.config.schema import LoraTable, ModelTable
    from fastsd.model.formats.load import load_model
    from fastsd.model.formats.lora_weights import load_lora
    from fastsd.model.lora import add_lora, merge_lora

    inputs = tensors_of(job)
    model = load_model(ModelTable(base=job["folder"]))
    if job["lora"]:
        add_lora(model, LoraTable(**job["lora_table"]), 0)
        load_lora(model, Path(job["lora"]))
        merge_lora(model)
    with torch.no_grad():
        conditioning, empty = model.text.encode(inputs["ids"]), model.text.encode(inputs["empty_ids"])
        eps = model.unet(inputs["x"], inputs["t"], inputs["context"])
        alpha = DDIMScheduler.from_config(model.scheduler).alphas_cumprod[-1]
        x = inputs["noise"] * (1 - alpha) ** 0.5
        output = model.unet(x, torch.tensor([len_of(model.scheduler) - 1]), empty)
        latents = denoised(alpha, x, output, v_prediction=model.prediction == "v_prediction")
        image = (model.vae.decode(latents)[0] / 2 + 0.5).clamp(0, 1)
    return {"conditioning": conditioning, "eps": eps, "image": image, "version": fastsd.__version__}


def len_of(scheduler: Any) -> int:
    return int(scheduler.get("num_train_timesteps", 1000))


def diffusers(job: Job) -> Arrays:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, __version__

    inputs, options = tensors_of(job), {"local_files_only": True, "torch_dtype": torch.float32, "safety_checker": None}
    if job["kind"] == "file":
        if tuple(map(int, __version__.split(".")[:2])) < (0, 28):
            raise NotImplementedError("before 0.28, it needs the yaml of the original code for a single file")
        pipe = StableDiffusionPipeline.from_single_file(job["file"], config=job["config"], **options)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(job["folder"], **options)
    if job["lora"]:
        path = Path(job["lora"])
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    with torch.no_grad():
        conditioning, empty = (pipe.text_encoder(inputs[name])[0] for name in ("ids", "empty_ids"))
        eps = pipe.unet(inputs["x"], inputs["t"], inputs["context"]).sample
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(1)
        last = scheduler.config.num_train_timesteps - 1
        x = inputs["noise"] * (1 - scheduler.alphas_cumprod[-1]) ** 0.5
        latents = scheduler.step(pipe.unet(x, last, empty).sample, last, x).pred_original_sample
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5
    return {"conditioning": conditioning, "eps": eps, "image": image.clamp(0, 1), "version": __version__}


def comfyui(job: Job) -> Arrays:
    """ComfyUI, from a checkout. Zero-SNR v-prediction is set by its node, as the model card tells users."""
    sys.path.insert(0, job["checkout"])
    sys.argv = ["comfyui", "--cpu", "--force-fp32", "--fp32-text-enc", "--fp32-vae"]
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing()
    import comfy.model_management  # type: ignore[import-not-found]
    import comfy.model_sampling  # type: ignore[import-not-found]
    import comfy.sd  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]
    import torch
    from comfyui_version import __version__  # type: ignore[import-not-found]

    inputs = tensors_of(job)
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(job["file"])
    if job["v_prediction"]:
        bases = (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION)
        sampling = type("ModelSampling", bases, {})(model.model.model_config, zsnr=True)
        model = model.clone()
        model.add_object_patch("model_sampling", sampling)
    if job["lora"]:
        model, clip = comfy.sd.load_lora_for_models(model, clip, comfy.utils.load_torch_file(job["lora"]), 1.0, 1.0)
    with torch.no_grad():
        ids = {name: [[(int(token), 1.0) for token in inputs[name][0]]] for name in ("ids", "empty_ids")}
        conditioning, empty = (clip.encode_from_tokens({"l": tokens}) for tokens in ids.values())
        comfy.model_management.load_models_gpu([model])
        unet, noise = model.model, inputs["noise"]
        eps = unet.diffusion_model(inputs["x"], inputs["t"].float(), context=inputs["context"])
        sigma = unet.model_sampling.sigma_max.reshape(1)
        latents = unet.apply_model(noise * sigma, sigma, c_crossattn=empty)
        image = vae.decode(unet.process_latent_out(latents))[0].permute(2, 0, 1)
    return {"conditioning": conditioning, "eps": eps, "image": image, "version": __version__}


def sd_scripts(job: Job) -> Arrays:
    """kohya-ss' sd-scripts, from a checkout. As with its image generator, the user states the prediction type."""
    sys.path.insert(0, job["checkout"])
    import torch
    from diffusers import DDIMScheduler
    from library import model_util  # type: ignore[import-not-found]
    from networks import lora  # type: ignore[import-not-found]

    inputs = tensors_of(job)
    text, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, job["file"])
    for module in (text, vae, unet):
        module.float().eval()
    if job["lora"]:
        network, weights = lora.create_network_from_weights(1.0, job["lora"], vae, text, unet, for_inference=True)
        network.merge_to(text, unet, weights, torch.float32, "cpu")
    with torch.no_grad():
        conditioning, empty = (text(inputs[name])[0] for name in ("ids", "empty_ids"))
        eps = unet(inputs["x"], inputs["t"], inputs["context"]).sample
        alpha = DDIMScheduler(**ALPHAS_OF_SD15, rescale_betas_zero_snr=job["v_prediction"]).alphas_cumprod[-1]
        x = inputs["noise"] * (1 - alpha) ** 0.5
        output = unet(x, torch.tensor([999]), empty).sample
        latents = denoised(alpha, x, output, v_prediction=job["v_prediction"])
        image = (vae.decode(latents / 0.18215).sample[0] / 2 + 0.5).clamp(0, 1)
    changes = Path(job["checkout"], "README.md").read_text(encoding="utf-8", errors="replace")
    version = next((line.strip("# ") for line in changes.splitlines() if line.lower().startswith("### version")), "")
    return {"conditioning": conditioning, "eps": eps, "image": image, "version": version or "checkout"}


def sd_cpp(job: Job) -> Arrays:
    """stable-diffusion.cpp, from the package stable-diffusion-cpp-python. It only gives out images of 8 bits.

    Its random numbers are those of PyTorch on CUDA, so `clients.py` computes the noise of `seed` itself.
    """
    from importlib.metadata import version

    from stable_diffusion_cpp import StableDiffusion  # type: ignore[import-not-found]

    options = {"lora_model_dir": str(Path(job["lora"]).parent)} if job["lora"] else {}
    model = StableDiffusion(model_path=job["file"], rng_type="cuda", wtype="f32", verbose=False, **options)
    prompt = f"<lora:{Path(job['lora']).stem}:1>" if job["lora"] else ""
    size = {"width": job["pixels"], "height": job["pixels"]}
    steps = {"sample_method": "euler", "scheduler": "discrete", "sample_steps": 1, "cfg_scale": 1.0, "seed": job["seed"]}
    image = np.asarray(model.generate_image(prompt=prompt, **size, **steps)[0].convert("RGB"), dtype=np.float32)
    return {"image": image.transpose(2, 0, 1) / 255, "version": version("stable-diffusion-cpp-python")}


ADAPTERS = {adapter.__name__: adapter for adapter in (fastsd, diffusers, comfyui, sd_scripts, sd_cpp)}


def main() -> None:
    from safetensors.numpy import save_file

    logging.disable(logging.WARNING)
    name, job, result = sys.argv[1:]
    try:
        values = ADAPTERS[name](json.loads(Path(job).read_text()))
    except NotImplementedError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_READ)
    version = str(values.pop("version"))
    arrays = {key: np.ascontiguousarray(np.asarray(value, dtype=np.float32)) for key, value in values.items()}
    save_file(arrays, result, {"version": version})


if __name__ == "__main__":
    main()
