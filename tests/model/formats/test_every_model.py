"""Every kind of model file that people have, made small: it is read exactly, in both ways, or refused in one sentence."""

import argparse
import collections
import contextlib
import datetime
import importlib
import json
import pathlib
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_kinds import CONV, FC1, KINDS, NORM, TO_K, merged_weight, numbers, write_adapter
from model_files import (
    assert_same,
    converted,
    edit_json,
    in_fp8,
    make_small_sd15,
    original_layout,
    renamed,
    single_file,
    spoil,
    states,
    with_channels,
    zero_snr_folder,
)
from safetensors.torch import load_file, save_file
from sentences import refused, says

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import component_state_dict, load_model
from fastsd.model.formats.original_names import PREFIX
from fastsd.model.shapes import read_shapes
from fastsd.storage import write_safetensors

UNET, VAE, TEXT = PREFIX["unet"], PREFIX["vae"], PREFIX["text_encoder"]
ones = torch.ones


@dataclass(frozen=True)
class Source:
    """The small model: its folder, its tensors in a single file, and the names of these by component and diffusers' name."""

    folder: Path
    state: dict[str, torch.Tensor]
    names: dict[tuple[str, str], str]
    states: dict[str, dict[str, torch.Tensor]]

    def as_read(self, values):
        """Return the weights by component that the tensors of a single file stand for."""
        tensors = {key: values[name] for key, name in self.names.items()}
        return {
            component: {name: tensors[component, name].reshape(tensor.shape) for name, tensor in state.items()}
            for component, state in self.states.items()
        }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every") / "m"
    model = make_small_sd15(folder)
    single_file(folder.parent / "one.safetensors", model)
    return Source(folder, load_file(folder.parent / "one.safetensors"), original_layout(model), states(folder))


@dataclass(frozen=True)
class Input:
    """A model that a row has made. `expected` are its weights, None for those of the source. `options` are those of convert."""

    path: Path
    expected: dict[str, dict[str, torch.Tensor]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A model to make, and the code of its refusal; "" if it is read exactly.

    Attributes:
        training: code of the refusal to train it, if not `code`.
        prints: what `convert` prints, or the refusal says: a text, or a sentence and its fields.
        settings: entries of JSON files of the folder that it is converted to.
        outs: names of what is written.
    """

    make: Callable[[Source, Path], Input]
    code: str = ""
    training: str = ""
    prints: str | tuple[str, dict[str, Any]] = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    outs: tuple[str, ...] = ("out", "out.safetensors")


def file(change=dict, ending="safetensors", write=write_safetensors, **options):
    """Return a maker of a file with the tensors `change(state)`."""

    def make(source, place):
        path, tensors = place / f"in.{ending}", change(source.state)
        write(path, tensors) if ending == "safetensors" else torch.save(tensors, path)
        return Input(path, options={name: str(value(source)) for name, value in options.items()})

    return make


def with_tensors(**tensors):
    return file(lambda state: {**tensors, **state})


def names(*replacements, ending="safetensors"):
    def change(state):
        tensors = renamed(state, *replacements)
        assert tensors.keys() != state.keys()
        return dict(sorted(tensors.items()))

    return file(change, ending)


def without(prefix):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def folder(change, **options):
    def make(source, place):
        values = {name: str(value(source)) for name, value in options.items()}
        return Input(Path(spoil(source.folder, place / "in", change)), options=values)

    return make


def fp8(dtype, scale_name, ending):
    def make(source, place):
        tensors, values = in_fp8(source.state, dtype, scale_name)
        marked = tensors | ({UNET + "scaled_fp8": torch.empty(0, dtype=dtype)} if scale_name else {})
        path = file(lambda state: marked, ending, lambda path, tensors: save_file(tensors, path))(source, place).path
        return Input(path, source.as_read(values))

    return make


def images(inputs, pipeline, *, as_file):
    """Return a maker of a model whose UNet takes an image: its folder, or a file of another tool."""

    def make(source, place):
        path = with_channels(source.folder, place / "in", inputs, pipeline)
        conv_in = {UNET + "input_blocks.0.0.weight": states(path)["unet"]["conv_in.weight"]}
        return Input(file(lambda state: state | conv_in)(source, place).path if as_file else path, states(path))

    return make


def pickled(value, zipped=True):
    """Return a maker of a checkpoint with `value()` beside the weights."""

    def make(source, place):
        path = place / "in.ckpt"
        with contextlib.ExitStack() as stack:
            data = {"state_dict": source.state, "x": {"y": [value(stack)]}}
            torch.save(data, path, _use_new_zipfile_serialization=zipped)
        return Input(path)

    return make


HARMLESS = {
    "a scalar of numpy": np.float64(0.25),
    "a dtype": np.dtype("float32"),
    "an array": np.arange(3),
    "an array of objects": np.array([{"a": 1}, "b"], dtype=object),
    "options": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/out")),
    "a namespace": types.SimpleNamespace(a=[1]),
    "a path": pathlib.PosixPath("/out"),
    "a path of Windows": pathlib.PureWindowsPath("C:/out"),
    "a time": datetime.datetime(2023, 1, 1, tzinfo=datetime.UTC),
    "a defaultdict": collections.defaultdict(dict, {"a": {"b": 1}}),
    "counts": collections.Counter("aab"),
}
PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
GLOBALS = {  # module -> names that a checkpoint may contain
    "numpy": "dtype ndarray", "numpy.core.multiarray": "scalar _reconstruct", "numpy._core.multiarray": "scalar _reconstruct",
    "argparse": "Namespace", "types": "SimpleNamespace", "pathlib": PATHS, "pathlib._local": PATHS,
    "datetime": "date datetime timedelta timezone", "collections": "defaultdict",
    "builtins": "bool dict float int list set str tuple",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "pytorch_lightning.utilities.parsing": "AttributeDict", "lightning_fabric.utilities.data": "AttributeDict",
    "omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig", "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode", "typing": "Any",
}  # fmt: skip


def all_globals(stack):
    """Return every class and function of `GLOBALS`, by stand-ins where a library or its version is not installed."""
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    values = []
    for module, words in GLOBALS.items():
        for name in words.split():
            with contextlib.suppress(ImportError, AttributeError):
                value = getattr(importlib.import_module(module), name)
                if (value.__module__, value.__qualname__) == (module, name):
                    values.append(value)
                    continue
            for parent in (".".join(module.split(".")[: i + 1]) for i in range(module.count("."))):
                if parent not in sys.modules:
                    patch.setitem(sys.modules, parent, types.ModuleType(parent))
            values.append(type(name, (dict,), {"__module__": module}))
            others = sys.modules.get(module, types.ModuleType(module))
            stand_in = types.ModuleType(module)
            stand_in.__dict__.update(vars(others), **{name: values[-1]})
            patch.setitem(sys.modules, module, stand_in)
    return values


def adapter(kind, strength):
    """Return a maker of the model with an adapter of this kind merged into it."""
    module, tensors, _, _ = KINDS[kind]
    component, _, layer = module.partition(".")

    def make(source, place):
        path = write_adapter(place / "a.safetensors", module, tensors)
        expected = {name: dict(state) for name, state in source.states.items()}
        expected[component][f"{layer}.weight"] = merged_weight(kind, expected[component][f"{layer}.weight"], strength)
        return Input(source.folder, expected, {"merge": (f"{path}:{strength}",)})

    return make


def adapters(label):
    """Return a maker of the model with an adapter of four layers, whose names are `label(module, its original name)`."""

    def make(source, place):
        tensors, expected = {}, {name: dict(state) for name, state in source.states.items()}
        for module in (TO_K, CONV, NORM, FC1):
            component, _, layer = module.partition(".")
            weight = expected[component][f"{layer}.weight"]
            original = source.names[component, f"{layer}.weight"].removeprefix(PREFIX[component]).removesuffix(".weight")
            tensors[f"{label(module, original)}.diff"] = numbers(*weight.shape)
            expected[component][f"{layer}.weight"] = weight + numbers(*weight.shape)
        save_file(tensors, place / "a.safetensors")
        return Input(source.folder, expected, {"merge": (str(place / "a.safetensors"),)})

    return make


def by_component(unet, text):
    """Return the label of a layer: a prefix and a name for each component, in terms of `layer`, `original` and underscores."""

    def label(module, original):
        is_unet, layer = module.startswith("unet."), module.partition(".")[2]
        fields = {"layer": layer, "original": original, "_layer": layer.replace(".", "_")}
        return (unet if is_unet else text).format(**fields, _original=original.replace(".", "_"))

    return label


# Leftovers: name of a tensor -> the label under which it is named.
LEFTOVERS = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_conv_in.lora_up.weight": "lora_unet_conv_in",
    "conditioner.embedders.0.x": "conditioner",
    "control_model.zero_convs.0.0.weight": "control_model",
    "cond_stage_model.model.ln_final.weight": "cond_stage_model.model",
    "cond_stage_model.logit_scale": "cond_stage_model.logit_scale",
    TEXT + "text_projection.weight": TEXT + "text_projection",
    TEXT + "logit_scale": TEXT + "logit_scale",
    TEXT + "visual_projection.weight": TEXT + "visual_projection",
    TEXT + "vision_model.embeddings.class_embedding": TEXT + "vision_model",
    VAE + "loss.logvar": VAE + "loss",
    VAE + "loss.discriminator.main.0.weight": VAE + "loss",
    VAE + "model_ema.decay": VAE + "model_ema",
    "model_ema.decay": "model_ema.decay",
    "model_ema.num_updates": "model_ema.num_updates",
    "model.betas": "model.betas",
}
ATTENTION = (("attn_1.q.", "attn_1.to_q."), ("attn_1.k.", "attn_1.to_k."), ("attn_1.v.", "attn_1.to_v."))
OLD_ATTENTION = (
    ("attn_1.q.", "attn_1.query."), ("attn_1.k.", "attn_1.key."), ("attn_1.v.", "attn_1.value."),
    ("attn_1.proj_out.", "attn_1.proj_attn."), ("attn_1.norm.", "attn_1.group_norm."),
)  # fmt: skip
NAMES = {
    "ComfyUI's text encoder": ((TEXT, "text_encoders.clip_l.transformer."),),
    "text encoder by name": ((TEXT, "cond_stage_model.clip_l.transformer."),),
    "text encoder without its prefix": ((TEXT, "clip_l.transformer."),),
    "text encoder without text_model": ((TEXT + "text_model.", TEXT),),
    "names of a VAE": ((VAE, "vae."),),
    "half-converted attention": (*ATTENTION, ("attn_1.proj_out.", "attn_1.to_out.0.")),
    "old half-converted attention": OLD_ATTENTION,
}
UNKNOWN = {
    "cond_stage_model.wrapped.text_model.": "cond_stage_model.wrapped.text_model.encoder.layers.0.layer_norm1.bias",
    "te.text_model.": "te.text_model.encoder.layers.0.layer_norm1.bias",
    "text_encoder.model.": "text_encoder.model.encoder.layers.0.layer_norm1.bias",
}
LAYERS = {  # names of adapters' layers in each tool
    "kohya": by_component("lora_unet_{_layer}", "lora_te_{_layer}"),
    "kohya, original layout": by_component("lora_unet_{_original}", "lora_te_{_layer}"),
    "ComfyUI": by_component("diffusion_model.{original}", "text_encoders.clip_l.transformer.{layer}"),
    "OneTrainer": by_component("lora_unet.{layer}", "lora_te.{layer}"),
    "OneTrainer's OMI": by_component("unet.{original}", "clip_l.{layer}"),
    "SimpleTuner": by_component("lycoris_{_layer}", "text_encoder.{layer}"),
}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
IMAGES = {
    "StableDiffusionInpaintPipeline": (9, "an inpainting base"),
    "StableDiffusionInstructPix2PixPipeline": (8, "a base for editing images (InstructPix2Pix)"),
}
INNER = UNET + "input_blocks.1.0.in_layers.2.weight"
SCALE = INNER.replace(".weight", ".scale_weight")
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
ZERO_SNR = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "_class_name": "DDIMScheduler",
}  # fmt: skip
MARKS = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
LOST_VAE = ("encoder.", "decoder.mid", "quant_conv")


def whole_clip(model):
    """Make the text encoder of a folder a whole CLIP."""
    path, config = model / "text_encoder" / "model.safetensors", model / "text_encoder" / "config.json"
    others = {"text_projection.weight": ones(2, 2), "logit_scale": ones(()), "vision_model.post_layernorm.bias": ones(2)}
    write_safetensors(path, {name: tensor.clone() for name, tensor in load_file(path).items()} | others)
    whole = {"model_type": "clip", "text_config": json.loads(config.read_text()), "architectures": ["CLIPModel"]}
    config.write_text(json.dumps(whole | {"vision_config": {}}))


def without_vae(model):
    shutil.rmtree(model / "vae")


def other_vae(source):
    return source.folder / "vae"


def quantized(**values):
    return file(lambda state: {**state, **{name: value(state) for name, value in values.items()}})


def as_int8(state):
    return state[INNER].char()


ROWS = {
    "plain": Row(file()),
    "plain, pickled": Row(file(ending="ckpt")),
    "plain folder": Row(folder(lambda path: None)),
    **{f"leftover {name}": Row(with_tensors(**{name: ones(2)}), prints=f"in.safetensors: ignored {label}\n")
       for name, label in LEFTOVERS.items()},
    "all leftovers": Row(
        with_tensors(**dict.fromkeys(LEFTOVERS, ones(2))), prints=f"ignored {', '.join(dict.fromkeys(LEFTOVERS.values()))}\n"
    ),
    "many leftovers": Row(
        with_tensors(**{f"lora_te_{i:02}.alpha": ones(1) for i in range(33)}), prints="lora_te_29 and 3 others\n"
    ),
    "a whole CLIP": Row(folder(whole_clip), prints="text_encoder: ignored text_projection, logit_scale, vision_model\n"),
    "the usual name and another": Row(with_tensors(**{"vae.quant_conv.bias": ones(8)}), prints="ignored vae\n"),
    **{name: Row(names(*replacements)) for name, replacements in NAMES.items()},
    "old names, pickled": Row(names(*OLD_ATTENTION, (TEXT, "text_encoders.clip_l.transformer."), ending="ckpt")),
    **{f"unknown {prefix}": Row(names((TEXT + "text_model.", prefix)), "single-file-text-names", outs=("out",),
                                prints=("single-file-text-names", {"name": name})) for prefix, name in UNKNOWN.items()},
    "no text encoder": Row(file(without(TEXT)), prints=("text-encoder-from", {"file": "in.safetensors"})),
    "only leftovers of a VAE": Row(
        file(lambda state: {**without(VAE)(state), **dict.fromkeys(LEFTOVERS, ones(2))}), "write-component-missing", "no-vae",
        outs=("out",),
    ),
    **{f"no {lost}": Row(file(without(VAE + lost)), code, outs=("out",)) for lost, code in
       zip(LOST_VAE, ("single-file-no-vae", "weights-names", "weights-names"), strict=True)},
    **{f"no {lost}, with --vae": Row(file(without(VAE + lost), vae=other_vae)) for lost in LOST_VAE},
    "a folder without VAE": Row(folder(without_vae), "component-missing"),
    "a folder without VAE, with --vae": Row(folder(without_vae, vae=other_vae)),
    "a folder without weights of the VAE, with --vae": Row(
        folder(lambda path: (path / "vae" / "diffusion_pytorch_model.safetensors").unlink(), vae=other_vae)
    ),
    **{f"{kind}{scale or ' plain'} {ending}": Row(
        fp8(dtype, scale, ending), prints=("fp8-scaled" if scale else "fp8-read", {"file": f"in.{ending}"}))
       for kind, dtype in FP8.items() for scale in ("", ".scale_weight", ".weight_scale")
       for ending in ("safetensors", "ckpt")},
    "int8": Row(quantized(**{INNER: as_int8}), "weights-quantized", prints=("weights-quantized", {"dtype": "int8"})),
    "int8 with a scale": Row(quantized(**{INNER: as_int8, SCALE: lambda state: ones(1)}), "weights-quantized"),
    "NF4": Row(quantized(**{INNER: lambda state: ones(9, 1).byte()}), "weights-quantized"),
    "a scale of each row": Row(quantized(**{SCALE: lambda state: ones(32)}), "scale-not-a-number"),
    **{f"{pipeline}, {'file' if as_file else 'folder'}": Row(
        images(inputs, pipeline, as_file=as_file), training="base-takes-images", settings={INDEX: {"_class_name": pipeline}})
       for pipeline, (inputs, _) in IMAGES.items() for as_file in (True, False)},
    "another pipeline": Row(
        folder(edit_json(INDEX, _class_name="StableDiffusionImg2ImgPipeline")),
        settings={INDEX: {"_class_name": "StableDiffusionImg2ImgPipeline"}},
    ),
    "a pipeline of nobody": Row(
        folder(edit_json(INDEX, _class_name="SomePipeline")), settings={INDEX: {"_class_name": "StableDiffusionPipeline"}}
    ),
    "SD2": Row(names(("stage_model.transformer.", "stage_model.model.")), "other-family"),
    "SDXL": Row(names(("cond_stage_model.", "conditioner.")), "other-family"),
    "v-prediction file": Row(
        file(lambda state: state | {"v_pred": MARKS["v_pred"]}), settings={SCHEDULER: {"prediction_type": "v_prediction"}}
    ),
    "zero-SNR v-prediction file": Row(file(lambda state: state | MARKS), settings={SCHEDULER: ZERO_SNR}),
    "zero-SNR v-prediction folder": Row(
        lambda source, place: Input(zero_snr_folder(source.folder, place / "in")), settings={SCHEDULER: ZERO_SNR}
    ),
    **{f"pickle with {name}": Row(pickled(lambda stack, value=value: value), prints=("entries-ignored", {"entries": "x"}))
       for name, value in HARMLESS.items()},
    "legacy pickle with all of these": Row(pickled(lambda stack: list(HARMLESS.values()), zipped=False)),
    "pickle with every harmless name": Row(pickled(all_globals)),
    "pickle with a function": Row(pickled(lambda stack: shutil.rmtree), "pickle-runs-code"),
    "out.ckpt": Row(file(ending="ckpt"), "folder-like-file", outs=("out.ckpt",)),
    **{f"{kind} times {strength}": Row(
        adapter(kind, strength), prints=("lora-merged", {"strength": strength, "kinds": f"{KINDS[kind][3]} 1"}))
       for kind in KINDS for strength in (1, -0.5)},
    **{f"adapter with {tool} names": Row(adapters(label)) for tool, label in LAYERS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_model_is_read_exactly_or_refused_in_one_sentence(name, source, tmp_path):
    row, place = ROWS[name], tmp_path / "made"
    place.mkdir()
    model = row.make(source, place)
    options = {"tokenizer": str(source.folder / "tokenizer"), **model.options}
    expected = model.expected or source.states
    if row.code:
        for out in row.outs:
            with refused(row.code) as error:
                converted(model.path, tmp_path / out, **options)
            assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
            assert printed(row, str(error.value))
        assert list(tmp_path.iterdir()) == [place]

    else:
        text = converted(model.path, tmp_path / "out", **options)
        assert_same(expected, states(tmp_path / "out"))
        assert printed(row, text)
        for path, entries in row.settings.items():
            assert entries.items() <= json.loads((tmp_path / "out" / path).read_text()).items()
    if model.path.suffix == ".ckpt" or "merge" in options:
        return  # not for training

    table = ModelTable(base=str(model.path), tokenizer=options["tokenizer"], vae=options.get("vae", ""))
    if row.training or row.code:
        with refused(row.training or row.code) as error:
            load_model(table)
        assert "\n" not in str(error.value)
        return
    loaded = load_model(table)
    trained = {component: component_state_dict(loaded, component) for component in ("unet", "text_encoder")}
    trained["vae"] = loaded.vae.module.state_dict()
    assert_same({c: {n: t.float() for n, t in state.items()} for c, state in expected.items()}, trained)


def printed(row, text):
    if isinstance(row.prints, str):
        return (row.prints in text and text.count(row.prints) <= 1) or not row.prints
    name, fields = row.prints
    return says(text, name, **fields)


@pytest.mark.parametrize("pipeline", IMAGES)
def test_diffusers_loads_what_is_written_of_models_that_take_images(pipeline, source, tmp_path):
    from diffusers import DiffusionPipeline

    inputs, kind = IMAGES[pipeline]
    model = images(inputs, pipeline, as_file=False)(source, tmp_path)
    converted(model.path, tmp_path / "out.safetensors")
    converted(tmp_path / "out.safetensors", tmp_path / "out", tokenizer=str(source.folder / "tokenizer"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(loaded).__name__ == pipeline and loaded.unet.config.in_channels == inputs
    with refused("base-takes-images", kind=kind, inputs=inputs, outputs=4):
        read_shapes(ModelTable(base=str(model.path)))
