"""Test the adapters' results, gradients and cost, and exchange LoRA files with other tools."""

import json
import re
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from adapters import BOTH, move, relative
from safetensors.torch import load_file
from sentences import LINES, pattern, refused, says
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from unets import CFG as SMALL
from unets import full_size

from fastsd.config.schema import LoraTable, ModelTable
from fastsd.errors import UserError
from fastsd.model.formats.load import component_state_dict, load_model
from fastsd.model.formats.lora_weights import load_lora, write_lora
from fastsd.model.lora import Adapted, add_lora, lora_state_dict, merge_lora
from fastsd.model.model import Model
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import ADAPTER, diffusers_names, diffusers_state_dict
from fastsd.storage import TensorFile, write_safetensors
from fastsd_kernels import CPU, REFERENCE, TRITON

ONE_LEVEL = replace(SMALL, block_out_channels=(16,), attention=(True,))
# Layers of every kind: fused, 1x1 convolutions that are linears here, 3x3 convolutions in and outside `recompute`, shortcuts.
EVERYTHING = LoraTable(rank=3, alpha=7.0, conv=2, targets=["*"])
TABLES = {
    "attention": LoraTable(),
    "one of a fused weight": LoraTable(targets=["to_v"], alpha=1.0),
    "two of a fused weight": LoraTable(targets=["attn1.to_q", "attn1.to_v", "attn2.to_k"]),
    "around the transformers": LoraTable(targets=["proj_in", "proj_out"]),
    "feed-forward": LoraTable(targets=["feed_forward"]),
    "time": LoraTable(targets=["time"]),
    "shortcuts": LoraTable(targets=["conv_shortcut"]),
    "convolutions": LoraTable(targets=["to_q"], conv=3),
    "some convolutions": LoraTable(targets=["to_q", "conv_out", "mid_block.resnets.1.conv2"], conv=3, alpha=2.0),
    "everything": EVERYTHING,
}


def lora_parameters(model: Model, component: str) -> set[str]:
    """Return the names of the adapters' parameters in a component's module."""
    return {name for name, _ in model.component(component).named_parameters() if ADAPTER in name}


def small_model(table: LoraTable | None, ops=REFERENCE, cfg=SMALL, seed: int = 0) -> Model:
    """Return a model that is only a UNet with fixed random weights, exact in bf16, and random adapters if there is a table."""
    torch.manual_seed(0)
    model = Model("small", UNet(cfg, ops), SimpleNamespace(module=nn.Module()), None, {})
    if table:
        add_lora(model, table, seed)
        move(model)
    for p in model.unet.parameters():
        p.data = p.data.bfloat16().float()
    return model


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2):
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(batch, 4, 4, 4, generator=generator), torch.randn(batch, 5, 16, generator=generator)
    return x.bfloat16().to(dtype), torch.tensor([3, 700])[:batch], context.bfloat16().to(dtype)


def predict(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.unet(*inputs())


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_applied_equals_merged(table):
    model, before = small_model(table), predict(small_model(None))
    applied = predict(model)
    merge_lora(model)
    error, change = relative(predict(model), applied), relative(before, applied)
    print(f"{error:.1e} of {change:.1e}")
    assert error <= 1e-5 and change > 1e-3
    assert not lora_parameters(model, "unet") and model.lora is None
    assert [name for name, _ in model.unet.named_parameters()] == [name for name, _ in UNet(SMALL).named_parameters()]


def merged_weights(model: Model, adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights W + alpha / rank * up @ down with which a UNet without adapters predicts the same."""
    dtype = next(iter(adapters.values())).dtype
    weights = {name: p.detach().to(dtype) for name, p in small_model(None, cfg=model.unet.cfg).unet.named_parameters()}
    for path, layer in model.unet.named_modules():
        if not isinstance(layer, Adapted):
            continue
        down, up = (adapters[f"{path}.lora_{letter}.default"] for letter in "AB")
        adapted = [i for i, block in enumerate(layer.target.blocks) if block]
        weight, rank = weights[f"{path}.weight"], layer.r["default"]
        factor, blocks = (model.lora.alpha or rank) / rank, list(weight.chunk(len(layer.target.blocks)))
        for i, down_i, up_i in zip(adapted, down.split(rank), up.chunk(len(adapted)), strict=True):
            blocks[i] = blocks[i] + factor * (up_i @ down_i.flatten(1)).view_as(blocks[i])
        weights[f"{path}.weight"] = torch.cat(blocks)
    return weights


def gradients(model: Model, dtype: torch.dtype, plain: bool) -> dict[str, torch.Tensor]:
    """Return the prediction and all adapters' gradients from our backward, or if `plain` from autograd over merged weights."""
    names = lora_parameters(model, "unet")
    unet = model.unet.to(dtype)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in unet.named_parameters() if name in names}
    batch = inputs(dtype, batch=1 if unet.cfg == ONE_LEVEL else 2)  # interpreted kernels are slow
    if plain:
        out = functional_call(small_model(None, cfg=unet.cfg).unet.to(dtype), merged_weights(model, leaves), batch)
    else:
        out = functional_call(unet, leaves, batch)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grads = torch.autograd.grad((out * target).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


OPS_AND_DTYPES = [(ops, dtype, SMALL) for ops in (REFERENCE, CPU) for dtype in (torch.float32, torch.bfloat16)]
OPS_AND_DTYPES += [(TRITON, torch.float32, ONE_LEVEL)]


@pytest.mark.slow
@pytest.mark.parametrize("ops, dtype, cfg", OPS_AND_DTYPES, ids=lambda value: getattr(value, "name", ""))
def test_gradients_are_as_close_to_fp64_as_autograds(ops, dtype, cfg):
    truth = gradients(small_model(EVERYTHING, cfg=cfg), torch.float64, plain=True)
    results = (
        gradients(small_model(EVERYTHING, ops, cfg), dtype, False),
        gradients(small_model(EVERYTHING, cfg=cfg), dtype, True),
    )
    assert truth.keys() == results[0].keys() and all(value.any() for value in results[0].values())
    errors = [torch.tensor([relative(grads[name], exact) for name, exact in truth.items()]).norm().item() for grads in results]
    print(f"{errors[0]:.2e} against {errors[1]:.2e}")
    assert errors[0] <= 2 * errors[1]


def test_recomputation_changes_no_gradient():
    model, gradients_by_level = small_model(EVERYTHING), []
    for level in ("none", "ff", "block"):
        model.unet.checkpointing = level
        model.unet.zero_grad()
        model.unet(*inputs()).square().mean().backward()
        gradients_by_level.append({name: p.grad.clone() for name, p in model.unet.named_parameters() if p.grad is not None})
    first, *others = gradients_by_level
    assert first.keys() == lora_parameters(model, "unet")  # a frozen weight has no gradient
    assert all(torch.equal(first[name], other[name]) for other in others for name in other)


def test_a_small_change_survives_bf16():
    """A change below bf16's step arrives in the mean when applied, and is mostly lost when merged into a bf16 weight."""
    model = small_model(LoraTable(targets=["transformers"]))
    move(model, size=2e-4)
    kept_shares = []
    for layer in (layer.bfloat16() for layer in model.unet.modules() if isinstance(layer, Adapted)):
        weight, bias, down, *ups = (None if value is None else value.detach() for value in layer.operands().flat())
        up = torch.block_diag(*ups)
        x = (torch.randn(256, weight.shape[1]) + 3 * down.sum(0)).bfloat16()
        change = x.double() @ down.double().t() @ up.double().t()
        merged = (weight.double() + up.double() @ down.double()).bfloat16()
        plain = nn.functional.linear(x, weight, bias)
        assert relative(plain + change, plain) < 2e-3
        for y in (layer(x).detach(), nn.functional.linear(x, merged, bias)):
            kept_shares.append((((y.double() - plain) * change).sum() / change.square().sum()).item())
    applied, merged = torch.tensor(kept_shares).view(-1, 2).mean(0).tolist()
    print(f"applied {applied:.3f}, merged {merged:.3f}")
    assert applied == pytest.approx(1, abs=0.05) and merged < 0.5


def flops(unet: UNet) -> list[dict]:
    """Return the operations of the forward and of the backward for one image at 512 px, by operator."""
    counts = []

    def counted(run):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            out = run()
        counts.append(counter.get_flop_counts()["Global"])
        return out

    out = counted(lambda: unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)))
    counted(lambda: out.backward(torch.ones_like(out)))
    return counts


@pytest.mark.slow
def test_frozen_weights_cost_no_gradient():
    with torch.device("meta"):
        (forward, backward), adapted = flops(UNet(UNetConfig.sd15())), flops(full_model(LoraTable()).unet)
    total, total_back, lora, lora_back = (sum(counts.values()) / 1e12 for counts in (forward, backward, *adapted))
    weights = total - forward[torch.ops.aten.bmm] / 1e12  # attention's matmuls have none
    print(f"TFLOP {lora:.3f} of {total:.3f} forward, {lora_back:.3f} of {total_back:.3f} backward")
    assert lora < 1.005 * total
    # Gradients of weights take as much as the forward.
    assert lora_back < total_back - 0.99 * weights


def full_model(table: LoraTable, seed: int = 0) -> Model:
    """Return a model of SD1.5's size with adapters, without data."""
    model = empty_model(Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE), REFERENCE)
    add_lora(model, table, seed)
    return model


def test_file_size_of_sd15(tmp_path):
    model = full_model(LoraTable())
    weights = {name: torch.zeros_like(model.unet.get_parameter(name), device="cpu") for name in lora_parameters(model, "unet")}
    assert sum(weight.numel() for weight in weights.values()) == 797_184
    write_lora(tmp_path / "lora.safetensors", model, {"unet": weights})
    size = (tmp_path / "lora.safetensors").stat().st_size
    print(f"{size / 1e6:.3f} MB")
    assert size == pytest.approx(3.2e6, rel=0.05)
    assert len(load_file(tmp_path / "lora.safetensors")) == 2 * 128


@pytest.mark.parametrize("table", [LoraTable(), EVERYTHING], ids=["attention", "everything"])
def test_diffusers_names_stay_exact(table):
    model = full_model(table)
    names = [file_name for name, _ in model.unet.named_parameters() for file_name in diffusers_names(name)]
    assert len(names) == len(set(names)) == 686
    assert set(names) == set(diffusers_state_dict(model.unet))
    assert sum(t.numel() for t in diffusers_state_dict(model.unet).values()) == 859_520_964


@pytest.mark.slow
def test_saves_no_more_for_backward_than_full_training():
    def saved_bytes(table: LoraTable | None) -> int:
        return full_size(lambda: full_model(table).unet if table else UNet(UNetConfig.sd15()), data=False)

    plain, attention, everything = (saved_bytes(table) for table in (None, LoraTable(), LoraTable(conv=4, targets=["*"])))
    print(f"saved for an image at 512 px, MB: {plain / 1e6:.1f}, {attention / 1e6:.1f}, {everything / 1e6:.1f}")
    assert attention < 0.96 * plain
    assert everything < 1.0005 * plain  # convolutions outside of `recompute` save rank numbers per position


@pytest.fixture
def tiny(tiny_model):
    """A function that loads the tiny model, with random adapters if there is a table."""

    def make(table: LoraTable | None = None, seed: int = 0, moved: bool = True, **settings) -> Model:
        model = load_model(ModelTable(base=str(tiny_model), **settings))
        if table:
            add_lora(model, table, seed)
            if moved:
                move(model)
        return model

    return make


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_adapters_of_the_text_encoder(tiny, clip_skip):
    model, plain = tiny(BOTH, moved=False, clip_skip=clip_skip), tiny(clip_skip=clip_skip)
    ids = model.text.tokenize(["a red circle", ""])
    assert len(lora_parameters(model, "text_encoder")) == 2 * 6 * (2 - clip_skip)  # skipped layers have none
    assert lora_parameters(model, "text_encoder") < model.trainable("text_encoder")
    assert relative(model.text.encode(ids), plain.text.encode(ids)) < 1e-6  # unchanged, because up is zero
    move(model)
    applied = model.text.encode(ids)
    applied.square().mean().backward()
    gradients = {name: p.grad is not None for name, p in model.text.module.named_parameters()}
    assert {name for name, has_gradient in gradients.items() if has_gradient} == lora_parameters(model, "text_encoder")
    merge_lora(model)
    assert relative(model.text.encode(ids), applied) < 1e-5 < 1e-2 < relative(plain.text.encode(ids), applied)
    assert component_state_dict(model, "text_encoder").keys() == component_state_dict(plain, "text_encoder").keys()


def test_component_state_dict_omits_adapters(tiny):
    adapted, plain = tiny(BOTH), tiny()
    for component in ("unet", "text_encoder"):
        state, expected = component_state_dict(adapted, component), component_state_dict(plain, component)
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
        parameters = dict(adapted.component(component).named_parameters())
        name = next(name for name in parameters if "base_layer.weight" in name)
        replaced = component_state_dict(adapted, component, {name: torch.full_like(parameters[name], 7.0)})
        assert sum(bool((tensor == 7).all()) for tensor in replaced.values()) == len(diffusers_names(name))


def test_initial_values_depend_only_on_seed_and_name(tiny):
    state = lora_state_dict(tiny(BOTH, moved=False, seed=5))
    torch.manual_seed(123)
    subset = lora_state_dict(tiny(LoraTable(rank=3, targets=["to_k"]), moved=False, seed=5))
    assert len(subset) == 2 * 2 * 4 and all(torch.equal(tensor, state[name]) for name, tensor in subset.items())
    other = lora_state_dict(tiny(BOTH, moved=False, seed=6))
    for name, down in state.items():
        if "lora_B" in name:
            assert not down.any()
            continue
        bound = down[0].numel() ** -0.5
        assert 0.8 * bound < down.abs().max() < bound and not torch.equal(down, other[name])
    assert len({down.flatten()[0].item() for name, down in state.items() if "lora_A" in name}) == len(state) / 2


def test_file_round_trip(tiny, tmp_path):
    model = tiny(BOTH)
    digest = write_lora(tmp_path / "a.safetensors", model)
    assert write_lora(tmp_path / "b.safetensors", model) == digest
    for source in (tmp_path / "a.safetensors", lora_state_dict(model)):
        other = tiny(BOTH, seed=9)
        load_lora(other, source)
        for component in ("unet", "text_encoder"):
            parameters = dict(other.component(component).named_parameters())
            assert all(torch.equal(p, parameters[name]) for name, p in model.component(component).named_parameters())
    # Write other tensors in place of the parameters, such as a run's exact weights or their EMA.
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    ups = torch.arange(3 * 32 * 3.0).view(96, 3)
    write_lora(tmp_path / "c.safetensors", model, {"unet": {f"{path}.to_qkv.lora_B.default": ups}})
    after, before = (load_file(tmp_path / f"{name}.safetensors") for name in "ca")
    assert torch.equal(after.pop(f"unet.{path}.to_k.lora_B.weight"), ups[32:64])
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"unet.{path}.{name}.lora_B.weight" for name in ("to_q", "to_v")}


@pytest.mark.slow
@pytest.mark.parametrize("table", [LoraTable(), LoraTable(conv=3, text_encoder=True), BOTH], ids=["plain", "conv", "all"])
def test_diffusers_computes_the_same_output(tiny, tiny_model, tmp_path, table):
    from diffusers import StableDiffusionPipeline

    model = tiny(table)
    write_lora(tmp_path / "lora.safetensors", model)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    ids, x, t = model.text.tokenize(["a red circle"]), torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        text_embeds = model.text.encode(ids)
        context = text_embeds.expand(2, -1, -1)
        out = model.unet(x, t, context)
        out_before, text_before = pipe.unet(x, t, context).sample, pipe.text_encoder(ids).last_hidden_state
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        errors = relative(pipe.unet(x, t, context).sample, out), relative(pipe.text_encoder(ids)[0], text_embeds)
    print(f"UNet {errors[0]:.1e}, text {errors[1]:.1e}")
    assert max(errors) <= 1e-5
    assert relative(out_before, out) > 1e-2 and (relative(text_before, text_embeds) > 1e-2) == table.text_encoder


def test_reads_a_file_written_by_diffusers(tiny, tiny_model, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    model = tiny(BOTH)
    write_lora(tmp_path / "ours.safetensors", model)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", adapter_name="default")
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(module) for component, module in modules.items()}
    configs = {f"{component}_lora_adapter_metadata": m.peft_config["default"].to_dict() for component, m in modules.items()}
    pipe.save_lora_weights(tmp_path, weight_name="theirs.safetensors", **layers, **configs)
    saved, tensors = (load_file(tmp_path / f"{name}.safetensors") for name in ("theirs", "ours"))
    assert {name.replace("text_model.", "") for name in tensors} == {name.replace("text_model.", "") for name in saved}
    other = tiny(BOTH, seed=1)
    load_lora(other, tmp_path / "theirs.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in lora_state_dict(other).items())


CONV_IN_ADAPTER = {
    "unet.conv_in.lora_A.weight": torch.zeros(3, 4, 3, 3),
    "unet.conv_in.lora_B.weight": torch.zeros(16, 3, 1, 1),
}
UNEXPECTED = {"kind": "unexpected", "name": "unet.conv_in.lora_A.weight"}
SET_RANK, SET_CONV, SET_ALPHA = (
    LINES["set-lora-settings"].format(settings=setting) for setting in ("rank = 3", "conv = 2", "alpha = 4.5")
)
MISSING = {"kind": "missing", "count": "2 of 158", "advice": LINES["match-lora-settings"]}
BAD = {  # change of the file's tensors, changed settings of the model, code and fields of the error
    "missing": (lambda state: dict(list(state.items())[2:]), {}, "weights-names", MISSING),
    "unexpected": (lambda state: {**state, **CONV_IN_ADAPTER}, {}, "weights-names", UNEXPECTED),
    "rank": (None, {"rank": 4}, "weights-shape", {"shape": (3, 16, 1, 1), "expected_shape": (4, 16, 1, 1), "advice": SET_RANK}),
    "conv": (None, {"conv": 1}, "weights-shape", {"shape": (2, 16, 3, 3), "expected_shape": (1, 16, 3, 3), "advice": SET_CONV}),
    "text encoder": (None, {"text_encoder": False}, "weights-names", {"kind": "unexpected", "count": 24}),
    "alpha": (None, {"alpha": 3.0}, "lora-other-alpha", {"scale": 2.25, "config_scale": 1.5, "advice": SET_ALPHA}),
}


LOCON = LoraTable(
    rank=4, alpha=2.0, conv=3, conv_alpha=1.0, text_encoder=True, targets=["transformers", "resnets", "attention"]
)


def test_alpha_of_convolutions(tiny, tmp_path):
    """A 3x3 convolution W becomes W + conv_alpha / conv up down, another layer W + alpha / rank up down."""
    model, plain = tiny(LOCON), {**component_state_dict(tiny(None), "unet")}
    adapters = lora_state_dict(model)
    merge_lora(model)
    merged = component_state_dict(model, "unet")
    for module, scale in (
        ("mid_block.resnets.0.conv1", 1 / 3),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 0.5),
    ):
        down, up = (adapters[f"unet.{module}.lora_{letter}.weight"].double().flatten(1) for letter in "AB")
        change = merged[f"{module}.weight"].double() - plain[f"{module}.weight"].double()
        assert relative(change, scale * (up @ down).view_as(change)) < 1e-5


@pytest.mark.parametrize("names", ["kohya", "peft", "checkpoint"])
def test_a_locon_is_continued_with_the_settings_that_the_message_names(tiny, tmp_path, names):
    """From the defaults, each message names settings, and the model has them after at most two."""
    write_lora(tmp_path / "locon.safetensors", tiny(LOCON), names=names)
    settings: dict = {}
    for _ in range(3):
        model = tiny(LoraTable(**settings), seed=3)
        try:
            load_lora(model, tmp_path / "locon.safetensors")
            break
        except UserError as error:
            advice = re.search(pattern("set-lora-settings"), str(error))[0]
            new = tomllib.loads(advice.removeprefix("set ").removesuffix(" in model.lora").replace(" and ", "\n"))
            assert not new.items() <= settings.items(), "the advice goes in a circle"
            settings |= new
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 77, 16)
    with torch.no_grad():
        outputs = [m.unet(x, t, context) for m in (model, tiny(LOCON), tiny(None))]
    assert relative(outputs[0], outputs[1]) < 1e-6 < 1e-3 < relative(outputs[2], outputs[1])
    assert settings["conv"] == 3 and settings["text_encoder"]
    if names != "peft":  # alpha is folded in there
        assert (settings["alpha"], settings["conv_alpha"]) == (2.0, 1.0)


def test_adapters_of_skipped_layers_are_left_out(tiny, tmp_path):
    """sd-scripts with its clip_skip = 2 makes adapters for the last layer as well. The others predict as in the file."""
    write_lora(tmp_path / "all.safetensors", tiny(BOTH), names="kohya")
    model, expected = tiny(BOTH, seed=3, clip_skip=1), tiny(BOTH, clip_skip=1)
    load_lora(model, tmp_path / "all.safetensors")
    ids = model.text.tokenize(["a red circle"])
    assert torch.equal(model.text.encode(ids), expected.text.encode(ids))
    path = tmp_path / "all.safetensors"
    assert any(says(note, "lora-skipped-layers", path=path, clip_skip=1) for note in model.notes)


def test_alpha_of_convolutions_in_the_header_of_kohya(tiny, tmp_path):
    write_lora(tmp_path / "locon.safetensors", tiny(LOCON), names="kohya")
    arguments = json.loads(TensorFile(tmp_path / "locon.safetensors").metadata["ss_network_args"])
    assert arguments == {"conv_dim": "3", "conv_alpha": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("change, settings, code, fields", BAD.values(), ids=BAD)
def test_files_that_do_not_fit_are_refused(tiny, tmp_path, change, settings, code, fields):
    original = path = tmp_path / "original.safetensors"
    write_lora(original, tiny(BOTH))
    if change:
        path = tmp_path / "lora.safetensors"
        write_safetensors(path, change(load_file(original)), TensorFile(original).metadata)
    model = tiny(BOTH.model_copy(update=settings), seed=2)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    with refused(code, **fields) as error:
        load_lora(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(model).items())


def test_a_damaged_file_is_refused(tiny, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with refused("safetensors-unreadable"):
        load_lora(tiny(BOTH), tmp_path / "x.safetensors")


NO_TEXT_LAYER = LoraTable(targets=["to_q"], text_encoder=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "table, code, fields",
    [
        (LoraTable(targets=["attention", "to_x"]), "lora-target", {"pattern": "'to_x'", "labels": "the unet"}),
        (LoraTable(targets=["norms"]), "lora-target", {"pattern": "'norms'"}),
        (LoraTable(targets=["conv1"]), "lora-target", {"convolutions": LINES["or-set-conv"]}),
        (NO_TEXT_LAYER, "lora-target-component", {"targets": "to_q", "labels": "the text encoder"}),
        (LoraTable(targets=["to_q", "to_x"], text_encoder=True), "lora-target", {"labels": "the unet or the text encoder"}),
        (LoraTable(targets=["layers.1"], text_encoder=True), "lora-target-component", {"labels": "the unet"}),
    ],
)
def test_targets_without_a_layer_are_refused(tiny, table, code, fields):
    model = tiny()
    with refused(code, **fields):
        add_lora(model, table, 0)
    assert model.lora is None and not any("lora" in name for name, _ in model.unet.named_parameters())
