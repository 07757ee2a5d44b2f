"""`fastsd init`: from options or questions to a config that fits the card, is checked, cached and trained as it is."""

import json
import re
import shlex
import tomllib
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from commandline import fastsd
from huggingface_hub.errors import LocalEntryNotFoundError
from model_files import make_small_sd15, single_file
from PIL import Image
from safetensors.torch import load_file, save_file
from sentences import refused, says
from tiny import make_tiny_model, tiny_vae

from fastsd.commands.init import DISPLAY, Answers, init
from fastsd.commands.job_file import GOALS
from fastsd.config.reference import entries
from fastsd.config.schema import BucketTable, load_config
from fastsd.demo.demo import MODELS
from fastsd.model.unet import UNetConfig
from fastsd.plan.plan import plan
from fastsd.terminal.console import Console

SIZES = (60, 80), (97, 64), (50, 75), (90, 91), (120, 81)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Sixteen JPEGs of odd sizes in a folder whose name has a space, each with a caption."""
    folder, numbers = tmp_path_factory.mktemp("photos") / "my photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(16):
        width, height = SIZES[number % 5]
        blotches = Image.fromarray(numbers.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        grain = np.asarray(blotches) + numbers.normal(0, 8, (height, width, 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"IMG {number}.jpg", quality=90)
        (folder / f"IMG {number}.txt").write_text(f'a photo of the "sea", number {number}\n')
    return folder


@pytest.fixture
def demo(photos) -> Answers:
    return Answers(base=str(MODELS / "base"), images=str(photos), card="4090")


def test_a_job_runs_as_it_is_written(photos, tmp_path, monkeypatch, capsys):
    """The printed commands work as they are, and nothing is edited between them."""
    monkeypatch.chdir(tmp_path)
    words = ["--images", photos, "--base", MODELS / "base", "--vae", MODELS / "vae", "--until", "2", "--precision", "fp32"]
    code, out, err = fastsd("init", "jobs/my job.toml", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    written = Path("jobs/my job.toml").read_bytes()
    commands = [line.strip() for line in out.partition("next:\n")[2].splitlines()]
    assert [line.split()[1] for line in commands] == ["plan", "check", "cache", "train", "watch", "sample"]
    header = [line for line in written.decode().splitlines() if line.startswith("#     ")]
    assert [re.split(r" {3,}", line[6:])[0] for line in header] == commands
    for line in commands:
        if line.split()[1] not in ("plan", "watch"):  # test_the_config_and_plan_agree; a server
            code, out, err = fastsd(*shlex.split(line)[1:], monkeypatch=monkeypatch, capsys=capsys)
            assert code == 0, (line, out, err)
            if "check" in line:
                assert says(out, "check-next") and not says(out, "check-failed")
    assert Path("jobs/my job.toml").read_bytes() == written
    assert Path("runs/my job/model.safetensors").exists() and Path("samples/grid.png").exists()
    config = load_config("jobs/my job.toml")
    assert (config.data.resolution, config.data.buckets.step, config.stage[0].batch) == (64, 8, 2)
    assert config.model.vae == str(MODELS / "vae") and "validate" not in written.decode()


def leaves(value) -> int:
    """Count the keys of a config that are not tables."""
    tables = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else [value]
    if not tables or not isinstance(tables[0], dict):
        return 1
    return sum(leaves(entry) for table in tables for entry in table.values())


@pytest.mark.parametrize("goal", GOALS)
def test_the_comments_are_true(goal, demo, tmp_path, monkeypatch):
    """Each key is explained and differs from its default, which the comment names; and `plan` reports the same micro-batch."""
    monkeypatch.chdir(tmp_path)
    path = init(None, replace(demo, goal=goal, vae=str(MODELS / "vae") if goal == "vae" else ""), console=Console(quiet=True))
    assert path == Path(f"my-photos-{goal}.toml")
    config, defaults = load_config(path), {entry.name: entry.default for entry in entries()}
    raw, lines, table, keys = tomllib.loads(path.read_text()), path.read_text().splitlines(), "", 0
    for line in lines:
        if heading := re.match(r"\[+([\w.]+)\]+", line):
            table = heading[1]
        elif key := re.match(r"(\w+) = (.*?)\s+# (\w.*?)(?: \(default (.+)\))?$", line):
            name, keys = f"{table}.{key[1]}".removeprefix("."), keys + 1
            assert key[4] in (defaults[name], None) and key[2] != key[4], line
            if key[4] is None:
                assert defaults[name] in ("", '""', "unset", "[]", key[2]), line
        else:
            assert re.match(r"(#|$|    \".*\",$|\]$)", line), line
    assert keys == leaves(raw) > 12
    assert f"# 16 images, all with captions, {SIZES[2][0]} x 75 to 120 x 81 px" in path.read_text()
    assert len({line for line in lines if "use 4" in line}) == 1 and len(lines) < 60

    assert re.match(r"# [A-Z].* (UNet|VAE|text encoder), for RTX 4090 ", lines[0]), lines[0]

    plan(config, 24 - DISPLAY, "4090", path=tmp_path / "plan.json", console=Console(quiet=True))
    (planned,) = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert planned["fits"] and planned["largest_micro_batch"] == config.stage[0].micro_batch_size


def test_questions_are_asked_again(photos, tmp_path, monkeypatch):
    """A bad answer is told in one sentence. An empty one is the default."""
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text("mine")
    answers = iter(
        ["best", "", "/no/model", str(MODELS / "base"), "/no/vae", str(MODELS / "vae"), "", "/no/photos", str(photos)]
        + ["5080x", "0.5", "RTX 4090", "old.toml", "job", "job.toml"]
    )
    questions, out = [], StringIO()
    init(None, Answers(), lambda text: questions.append(text) or next(answers), Console(file=out, width=300))
    assert not list(answers) and Path("old.toml").read_text() == "mine"
    defaults = ["goal [vae]", "goal [vae]", *["base model"] * 2, *["VAE"] * 2]
    assert [text.partition(" [stable")[0].partition(" [stabil")[0].removesuffix(": ") for text in questions[:6]] == defaults
    for name in ("init-goal", "init-no-images", "folder-missing", "unknown-card", "init-out-exists", "init-out-ending"):
        assert says(out.getvalue(), name), name
    assert out.getvalue().count("neither an existing path") == 2
    config = load_config("job.toml")
    assert config.model.vae == str(MODELS / "vae") and config.stage[0].name == "unet"
    assert "fastsd plan job.toml --card 4090 --vram 23" in out.getvalue()
    refusals = [line for line in out.getvalue().splitlines() if "choose from RTX" in line]
    assert refusals and not any("--vram" in line for line in refusals), "fastsd init has no such option"
    assert max(map(len, questions[:-1])) < 70, "questions and short answers fit a line"


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_a_stop_writes_nothing(end, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = iter(["lora", str(MODELS / "base"), str(photos), "12"])

    def ask(question):
        if (text := next(answers, None)) is None:
            raise end
        return text

    out = StringIO()
    with pytest.raises(KeyboardInterrupt):
        init(None, Answers(), ask, Console(file=out))
    assert not list(tmp_path.iterdir())
    assert out.getvalue().endswith("\n\n"), "the next message starts a line, and does not continue the question's"


def test_without_a_terminal_nothing_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
    code, _, err = fastsd("init", "--base", MODELS / "base", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(err, "init-no-images") and not list(tmp_path.iterdir())


def test_answers_that_cannot_be_used(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text("mine")
    Path("damaged").mkdir()
    Path("damaged/a.jpg").write_bytes(b"no image")
    tiny_vae(channels=8).save_pretrained("vae8")
    cases = [
        ("init-goal", {"goal": "best"}, {"goal": "'best'"}),
        ("init-out-exists", {}, {"path": "job.toml"}),
        ("source-missing", {"base": "/no/model"}, {"field": "--base"}),
        ("init-path", {"base": "${NO_SUCH}/a"}, {}),
        ("vae-channels", {"vae": "vae8"}, {"channels": 8}),
        ("init-no-images", {"images": ""}, {}),
        ("init-unusable-images", {"images": "damaged"}, {}),
        ("unknown-card", {"card": "5080x"}, {}),
        ("init-resolution", {"resolution": "large"}, {}),
        ("model-resolution", {"resolution": "70"}, {"step": 32, "low": 64}),
        ("config-invalid", {"until": "soon"}, {}),
        ("init-does-not-fit", {"card": "1.81", "goal": "lora"}, {"room": 0.81}),
    ]
    for code, changes, fields in cases:
        out = Path("job.toml" if code == "init-out-exists" else "new.toml")
        with refused(code, **fields):
            init(out, replace(demo, **changes), console=Console(quiet=True))
    assert Path("job.toml").read_text() == "mine" and not Path("new.toml").exists()
    with refused("init-out-ending", out="'damaged'"):  # the folder of images in OUT's place; before it is looked at
        init(Path("damaged"), replace(demo, base="/no/model"), console=Console(quiet=True))


def test_a_base_and_a_vae_that_are_single_files(demo, tmp_path, monkeypatch):
    """The config has what the files lack: a tokenizer, and the VAE's scaling factor, which is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    cfg = UNetConfig(block_out_channels=(64, 128), attention=(True, False), layers_per_block=2, cross_attention_dim=64)
    model = make_tiny_model(tmp_path / "small", cfg)  # with SD1.5's numbers of heads and norm groups, as files have them
    model.vae.module = tiny_vae(groups=32, width=32)
    single_file(Path("base.safetensors"), model)
    files = replace(demo, base="base.safetensors", vae="base.safetensors", resolution="64")
    with refused("init-scaling-factor", vae="base.safetensors"):
        init(Path("job.toml"), files, console=Console(quiet=True))
    init(Path("job.toml"), replace(files, vae_scaling_factor="0.2"), console=Console(quiet=True))
    table = load_config("job.toml").model
    assert (table.vae_scaling_factor, table.tokenizer) == (0.2, "openai/clip-vit-large-patch14")
    answers = iter(
        ["", "base.safetensors", "base.safetensors", "none", "base.safetensors", "", demo.images, "12", "asked.toml"]
    )
    out = StringIO()
    init(None, Answers(), lambda question: next(answers), Console(file=out, width=300))
    assert says(out.getvalue(), "init-scaling-factor", factor="'none'")
    assert load_config("asked.toml").model.vae_scaling_factor == 0.13025


def test_a_model_without_a_component_is_named(demo, tmp_path):
    model = make_small_sd15(tmp_path / "small")
    single_file(tmp_path / "whole.safetensors", model)
    unet = {name: tensor for name, tensor in load_file(tmp_path / "whole.safetensors").items() if "first_stage" not in name}
    save_file(unet, tmp_path / "no-vae.safetensors")
    with refused("init-component", option="--base", component="vae"):
        init(tmp_path / "job.toml", replace(demo, base=str(tmp_path / "no-vae.safetensors")), console=Console(quiet=True))


def test_a_base_that_is_not_on_this_machine(photos, tmp_path, monkeypatch):
    """A hub id is not downloaded. It counts as SD1.5, and 512 px have the default buckets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastsd.plan.fitting.fitting_stage", lambda shapes, stages, *rest: stages[0])
    monkeypatch.setattr("huggingface_hub.snapshot_download", local_only)
    answers, out = Answers(base="nobody/nothing", vae="nobody/a-vae", images=str(photos)), StringIO()
    init(Path("job.toml"), answers, console=Console(file=out, width=300))
    for name in ("nobody/nothing", "nobody/a-vae"):  # either may be a mistyped path
        assert f"{name} is no path here: it is taken as a hub id" in out.getvalue()
    config = load_config("job.toml")
    assert (config.model.base, config.model.vae, config.data.resolution) == ("nobody/nothing", "nobody/a-vae", 512)
    assert config.data.buckets == BucketTable() and config.stage[0].optimizer == "dlion"


def local_only(name, local_files_only=False):
    assert local_files_only
    raise LocalEntryNotFoundError(name)
