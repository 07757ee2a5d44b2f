"""Prompts with settings of their own, from a config and from a file as sd-scripts reads it, and the images drawn from them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentences import pattern, refused, says

from fastsd.config.schema import ModelTable, PromptTable, SampleTable, dump_config, load_config, parse_config
from fastsd.model.formats.load import load_model
from fastsd.model.model import Model
from fastsd.model.text_encoder import divide
from fastsd.run.folder import WHOLE_SHEET, read_grid
from fastsd.sampling.generate import draw, generate
from fastsd.sampling.grid import sample_grid, save_grid
from fastsd.sampling.prompts import batches_of, images_of, notes_on_prompts, parse_prompt, read_prompts
from fastsd_kernels import noise

FILE = """\ufeff# sizes and settings, as in sd-scripts
a red circle

a blue star --w 32 --h 48 --d 5 --s 3 --l 2.5 --n blurry, dark
  # another comment
a --W 48 --n --d 18446744073709551615
--s 1
"""


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return load_model(ModelTable(base=str(tiny_model)))


def sd_scripts(line: str) -> dict[str, object]:
    """Options of a line by the rules of sd-scripts' `line_to_prompt_dict`: split at " --", one regular expression each."""
    prompt, *options = line.split(" --")
    values: dict[str, object] = {"prompt": prompt}
    rules = {"width": r"w (\d+)", "height": r"h (\d+)", "seed": r"d (\d+)", "steps": r"s (\d+)", "guidance": r"l ([\d\.]+)"}
    for option in options:
        for key, rule in (rules | {"negative": r"n (.+)"}).items():
            if match := re.match(rule, option, re.IGNORECASE):
                values[key] = match[1] if key == "negative" else float(match[1])
    return values


LINE = "a blue star, in the sky --w 32 --H 48 --d 5 --s 3 --l 2.5 --n blurry, dark"


def test_a_line_means_the_same_as_in_sd_scripts():
    assert parse_prompt(LINE, "").model_dump() == sd_scripts(LINE)
    assert parse_prompt("a-b -c", "").model_dump(exclude_none=True) == sd_scripts("a-b -c") == {"prompt": "a-b -c"}


def test_a_file_has_prompts_options_and_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(FILE, encoding="utf-8")
    prompts = read_prompts(SampleTable(prompts=["first"], prompts_file=str(path)))
    assert prompts == [
        PromptTable(prompt="first"),
        PromptTable(prompt="a red circle"),
        PromptTable(prompt="a blue star", width=32, height=48, seed=5, steps=3, guidance=2.5, negative="blurry, dark"),
        PromptTable(prompt="a", width=48, negative="", seed=2**64 - 1),
        PromptTable(prompt="", steps=1),
    ]


@pytest.mark.parametrize("option", ["ss euler_a", "am 1", "cn a.png", "xyz", "x 3", "w512", " on a mat", "-"])
def test_other_options_are_refused(option, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a\na cat --w 64 --{option} --h 64\n")
    with refused("prompt-option", place=f"{path}, line 2", option=repr(f"--{option}")):
        read_prompts(SampleTable(prompts_file=str(path)))


@pytest.mark.parametrize("text", ["--w big", "--w 7.5", "--d -", "--l x", "--s", "--h 64 64"])
def test_values_that_are_no_numbers_are_refused(text):
    with refused("prompt-option-value", place="p.txt, line 1", name=text[2]):
        parse_prompt(f"a {text}", "p.txt, line 1")


@pytest.mark.parametrize(("text", "key"), [("--w 0", "width"), ("--d 18446744073709551616", "seed"), ("--l nan", "guidance")])
def test_values_out_of_range_are_refused(text, key):
    with refused("prompt-option-range", place="p.txt, line 1") as info:
        parse_prompt(f"a {text}", "p.txt, line 1")
    assert f"{key} is " in str(info.value)


def test_a_table_in_a_config_is_a_prompt(tmp_path, tiny_model):
    text = f"""[model]
base = "{tiny_model}"
[data]
folders = ["images"]
[sample]
prompts = ["a", {{ prompt = "b", width = 32, seed = 7, guidance = 2 }}]
size = 16
[[stage]]
train = ["unet"]
until = 1
"""
    (tmp_path / "job.toml").write_text(text)
    config = load_config(tmp_path / "job.toml")
    images = images_of(config.sample, 99)
    assert [(image.prompt, image.seed, image.width, image.height, image.guidance, image.label) for image in images] == [
        ("a", 0, 16, 16, 7.0, ""), ("a", 1, 16, 16, 7.0, ""),
        ("b", 7, 32, 16, 2.0, "b --w 32 --d 7 --l 2.0"), ("b", 8, 32, 16, 2.0, "b --w 32 --d 7 --l 2.0"),
    ]  # fmt: skip
    assert parse_prompt(images[2].label, "") == config.sample.prompts[1]
    assert parse_config(config.model_dump(by_alias=True), "") == config and '"width": 32' in dump_config(config)
    for change, fact in (("width", "widht"), ("prompt =", "text ="), ("seed = 7", "seed = 1.5"), ("guidance = 2", "steps = 0")):
        (tmp_path / "job.toml").write_text(text.replace(change, fact))
        with refused("config-invalid") as info:
            load_config(tmp_path / "job.toml")
        assert all("sample.prompts.1." in line for line in str(info.value).split("\n"))


def test_the_defaults_come_from_the_sample_table():
    (image,) = images_of(SampleTable(prompts=["a"], images=1, size=64, height=32, negative="n", steps=9, seed=4), 512)
    assert (image.width, image.height, image.negative, image.steps, image.seed) == (64, 32, "n", 9, 4)
    assert [image.width for image in images_of(SampleTable(prompts=["a"]), 512)] == [512, 512]
    assert [image.seed for image in images_of(SampleTable(prompts=["a"], seed=2**64 - 1), 8)] == [2**64 - 1, 0]


def test_each_image_is_drawn_with_its_own_settings(model):
    """Every setting changes the picture, and an image in a mixed grid equals the same image drawn alone."""
    options = ("", "--w 32", "--h 32", "--d 5", "--s 3", "--l 2", "--n blue", "--w 48 --h 32 --n blue")
    prompts = [parse_prompt(f"a red circle {option}", "") for option in options]
    table = SampleTable(prompts=prompts, images=1, steps=2)
    images = images_of(table, 16)
    drawn = draw(model, images, table)
    sizes = [(16, 16), (32, 16), (16, 32), (16, 16), (16, 16), (16, 16), (16, 16), (48, 32)]
    assert [image.size for image in drawn] == sizes
    assert len({image.tobytes() for image in drawn}) == len(drawn)
    for settings, image in zip(images, drawn, strict=True):
        alone = np.asarray(draw(model, [settings], table)[0]).astype(int)
        assert np.abs(alone - np.asarray(image)).max() <= 1  # another batch may round differently
    (plain,) = generate(model, ["a red circle"], [0], table, 16)
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(drawn[0])).max() <= 1


def test_images_of_one_shape_steps_and_guidance_go_together():
    options = ("", "--w 32", "", "--n x --d 3", "--s 3", "--w 32", "--l 2")
    table = SampleTable(prompts=[parse_prompt(f"a {option}", "") for option in options], images=1)
    assert batches_of(images_of(table, 16), 2) == [[0, 2], [3], [1, 5], [4], [6]]
    same = images_of(SampleTable(prompts=["a", "b", "c"], images=3), 16)
    assert batches_of(same, 8) == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]  # as before there were settings of prompts


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_a_seed_has_64_bits(seed, model):
    for sampler in ("dpm++", "euler_a"):
        table = SampleTable(sampler=sampler, steps=2)
        images = generate(model, ["a"] * 2, [seed, seed % 2**32], table, 16)
        assert images[0].tobytes() != images[1].tobytes()
    position = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    words = noise.philox(0, noise.Purpose.SAMPLE, position, torch.arange(1))
    assert not torch.equal(words, noise.philox(0, noise.Purpose.SAMPLE, position % 2**32, torch.arange(1)))


def test_stochastic_samplers_read_all_bits_of_a_seed(model, monkeypatch):
    """PyTorch's generators on the CPU read 32 bits of a seed."""
    seeds, plain = [], torch.Generator.manual_seed

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return plain(self, seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    generate(model, ["a"] * 3, [7, 7 + 2**32, 7 + 2**63], SampleTable(sampler="euler_a", steps=1), 16)
    assert seeds[0] == 7 and len({seed % 2**32 for seed in seeds}) == 3


@pytest.mark.parametrize(("line", "size"), [("a --w 33", "33 x 16"), ("a --h 2", "16 x 2")])
def test_sides_that_the_model_does_not_support_are_refused(line, size, model):
    width, height = size.split(" x ")
    table = SampleTable(prompts=[parse_prompt(line, "")])
    with refused("sample-size", width=width, height=height, step=4):
        sample_grid(model, table, 16)


SIZES = [(16, 16)] * 2 + [(48, 32)] * 4 + [(16, 32)] * 2


def test_a_grid_has_images_of_unlike_sizes_and_their_settings(model, tmp_path):
    prompts = [parse_prompt(line, "") for line in ("a", "b --w 48 --h 32", "b --w 48 --h 32 --s 3", "c --h 32 --n dark")]
    table = SampleTable(prompts=prompts, steps=2, seed=3)
    sheet = sample_grid(model, table, 16)
    save_grid(sheet, tmp_path / "unet-00000004.png", "unet", 4, "ema")
    stored = read_grid(tmp_path / "unet-00000004.png", "unet", 4)
    assert stored.weights == "ema"
    labels = ["a", "b --w 48 --h 32", "b --w 48 --h 32 --s 3", "c --h 32 --n dark"]
    assert list(stored.cells) == [(label, seed) for label in labels for seed in (3, 4)]
    assert [image.size for image in stored.cut().values()] == SIZES
    drawn = draw(model, images_of(table, 16), table)
    assert all(np.array_equal(*pair) for pair in zip(stored.cut().values(), drawn, strict=True))
    assert sheet.info["cells"][5] | {"box": 0} == {
        "box": 0, "prompt": "b", "negative": "", "seed": 4, "width": 48, "height": 32, "steps": 3, "guidance": 7.0,
        "label": "b --w 48 --h 32 --s 3",
    }  # fmt: skip
    boxes = list(stored.cells.values())
    covered = np.zeros((sheet.height, sheet.width), int)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] += 1
    assert covered.max() == 1 and covered.sum() == sum(width * height for width, height in SIZES)


def test_a_grid_of_an_older_version_is_read(tmp_path):
    sheet = Image.new("RGB", (24, 24))
    sheet.info["cells"] = [{"box": [4, 4, 20, 20], "prompt": "a cat --w 3", "seed": 5}]
    save_grid(sheet, tmp_path / "unet-00000004.png")
    stored = read_grid(tmp_path / "unet-00000004.png", "unet", 4)
    assert stored.cells == {("a cat --w 3", 5): (4, 4, 20, 20)} and stored.weights == "model"
    sheet.info["cells"] = ["damaged"]
    save_grid(sheet, tmp_path / "unet-00000004.png")
    assert list(read_grid(tmp_path / "unet-00000004.png", "unet", 4).cells) == [WHOLE_SHEET]


@pytest.mark.parametrize("place", ["prompt", "negative", "own negative"])
def test_a_prompt_that_is_cut_is_named_with_the_rest(place, model):
    words = ["red"] * 75 + ["blue", "star"]
    text, capacity = ", ".join(words), 75
    ids = model.text.tokenizer(text, add_special_tokens=False).input_ids
    table = {
        "prompt": SampleTable(prompts=["a", text, text]),
        "negative": SampleTable(prompts=["a"], negative=text),
        "own negative": SampleTable(prompts=[PromptTable(prompt="a", negative=text)]),
    }[place]
    (note,) = notes_on_prompts(model.text, table)
    chunks = -(-len(ids) // 75)
    assert says(note, "prompt-cut", count=len(ids), capacity=capacity, advice=f", or set chunks to {chunks}")
    unread = pattern("prompt-cut", count=len(ids)).fullmatch(note)
    assert unread and note.count(model.text.tokenizer.decode(ids[75:])) == 1 and "star" in note
    exactly = model.text.tokenizer.decode(ids[:75])
    assert notes_on_prompts(model.text, SampleTable(prompts=[exactly])) == []


def test_a_prompt_that_is_cut_is_divided_as_the_config_says(model, monkeypatch):
    text = ", ".join(["red circle"] * 90)
    ids = model.text.tokenizer(text, add_special_tokens=False).input_ids
    for chunks, cut in (("auto", "tokens"), (2, "commas"), (1, "words")):
        monkeypatch.setattr(model.text, "chunks", chunks)
        monkeypatch.setattr(model.text, "cut", cut)
        windows = divide(model.text.tokenizer, ids, 75, cut)
        read = sum(map(len, windows[: 3 if chunks == "auto" else chunks]))
        (note,) = notes_on_prompts(model.text, SampleTable(prompts=[text]))
        assert says(note, "prompt-cut", count=len(ids), capacity=read, unread=repr(model.text.tokenizer.decode(ids[read:])))
    monkeypatch.setattr(model.text, "chunks", "auto")
    assert notes_on_prompts(model.text, SampleTable(prompts=[model.text.tokenizer.decode(ids[:225])])) == []
    (note,) = notes_on_prompts(model.text, SampleTable(prompts=[text * 9]))
    assert note.endswith("shorten it")  # more chunks than a config may have


def test_options_in_the_list_of_prompts_are_named(model):
    """They are text there: older configs keep their images."""
    notes = notes_on_prompts(model.text, SampleTable(prompts=["a --w 64", "a --b", "c"]))
    assert len(notes) == 1 and says(notes[0], "prompt-options-as-text", prompt="'a --w 64'")
    assert [image.prompt for image in images_of(SampleTable(prompts=["a --w 64"], images=1), 16)] == ["a --w 64"]


def test_the_documents_have_a_line_with_options():
    page = (Path(__file__).parents[2] / "docs" / "using-models.md").read_text()
    lines = [line for line in page.splitlines() if " --w " in line and " --n " in line]
    assert lines and all(parse_prompt(line.strip(), "").width for line in lines)
