"""Code in the documentation and in messages: every block is run or read as what it is, every command is parsed."""

import ast
import json
import re
import shlex
import shutil
import tarfile
import tomllib
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from adapters import BOTH, move
from commandline import fastsd
from environment import ROOT
from model_files import single_file
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file
from sentences import SENTENCES
from tiny import job, make_tiny_model, tiny_vae, write_images

from fastsd.commands.cache import cache as build
from fastsd.commands.check import check
from fastsd.config.schema import Config, load_config, parse_config
from fastsd.model.formats.lora_weights import write_lora
from fastsd.model.lora import add_lora
from fastsd.model.unet import UNetConfig
from fastsd.run.loop import train
from fastsd.terminal.console import Console

# The pages for users, in the order in which their commands work.
NAMES = (
    "install data first-run monitoring d-lion smaller-cards "
    "several-gpus other-trainers using-models experiments performance library"
)
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES.split()), "docs/troubleshooting.md", "docs/config.md"]
DOCUMENTS = [*PAGES, "CONTRIBUTING.md", "configs/README.md", "bench/README.md", "kernels/README.md", "docs/glossary.md"]
CONFIGS = sorted(ROOT.glob("configs/*.toml"))
FIGURES = {  # blocks that are no code, by their first word
    "unet": "the line that a run shows",
    "runs/xlsd/": "the files of a run",
    "kernels/": "the folders of the repository",
    "kernels/fastsd_kernels/": "the floors",
    "#!/bin/bash": "a Slurm job; tests/faults/rank_kills.py runs it with stand-ins of srun and scontrol",
}
NOT_RUN = {  # programs that are only checked to exist, with the reason
    "fastsd demo": "takes minutes; .ci/run and tests/demo run it",
    "fastsd init": "asks at a terminal; tests/commands/test_init.py runs it",
    "fastsd watch": "ends at Ctrl-C; tests/compare/test_watch.py runs it",
    "pip": "installs",
    "pytest": "is this test's own program",
    "ruff": "checks the code; .ci/run runs it",
    ".ci/run": "runs all of these",
    "torchrun": "needs several GPUs; tests/run/test_ranks.py starts ranks by it",
    "sbatch": "needs a cluster; tests/data/building/test_machines.py starts machines",
    "python": "takes minutes or compiles for GPUs; tests/bench runs what does not",
}


SUFFIXES = ("py", "sqlite", "safetensors", "jsonl", "json")  # of files that are named like a table of the config

SQL = re.compile(r"\b(SELECT|FROM|WHERE|ON|INDEX|TABLE|UPDATE)\b|sample\.content")


def blocks(document: str) -> list[str]:
    """Return the indented and fenced blocks of a document that is no list."""
    text = (ROOT / document).read_text()
    matches = re.findall(r"(?<=\n\n)(?: {4}.+\n|\n(?= {4}))+|^```.*\n(?:.*\n)*?```", text, re.MULTILINE)
    plain = [re.sub(r"^ {4}|^```.*$", "", block, flags=re.MULTILINE).strip("\n") for block in matches]
    return [block for text in plain for block in text.split("\n\n")]


def kind(block: str) -> str:
    first = block.split()[0]
    if first in FIGURES:
        return "figure"
    if first.startswith("["):
        return "toml"
    if " --w " in block:
        return "prompts"
    if first in ("from", "import"):
        return "python"
    assert first == "fastsd" or first in NOT_RUN or "=" in first, block
    return "shell"


def all_blocks(kind_: str) -> list[str]:
    return [block for document in DOCUMENTS for block in blocks(document) if kind(block) == kind_]


def command_of(line: str) -> list[str]:
    """Return the words of a line of a shell block, without the explanation, which follows after two spaces or #."""
    program, _, rest = line.split("  #")[0].strip().partition(" ")
    name, _, rest = rest.strip().partition(" ")
    return shlex.split(f"{program} {name} " + re.split(r"\s{2,}", rest.strip())[0])


@cache
def printed_texts() -> list[str]:
    """Return the texts in fastsd's source. What varies is X."""
    texts = []
    for path in sorted([*ROOT.glob("fastsd/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("examples/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def mentioned_commands() -> list[list[str]]:
    """Return the commands of fastsd in documents, configs and messages."""
    texts = [(ROOT / document).read_text() for document in DOCUMENTS]
    texts += [
        "\n".join(line.removeprefix("# ") for line in path.read_text().splitlines()) for path in CONFIGS
    ] + printed_texts()
    spans = {" ".join(span.split()) for text in texts for span in re.findall(r"`fastsd ([^`]+)`", text)}
    lines = [line for path in CONFIGS for line in re.findall(r"^# {5}fastsd .*$", path.read_text(), re.MULTILINE)]
    lines = [line.removeprefix("#").strip() for line in lines]
    return [with_values(shlex.split(span)) for span in sorted(spans)] + [command_of(line)[1:] for line in lines]


@cache
def command_group():
    """Return the command line with all commands, which takes longer to make than a command to parse."""
    from fastsd import cli

    return typer.main.get_command(cli.app)


def parse(words: list[str]) -> None:
    """Parse a command as the command line does. Without arguments, it is only a mention of a command, or of its options."""
    group = command_group()
    if words[0].startswith("--"):
        assert words[0] in {option for parameter in group.params for option in parameter.opts}
        return
    command = group.commands[words[0]]
    options = {option for parameter in command.params for option in parameter.opts}
    if words[1:] and not words[1].startswith("--"):
        command.make_context(words[0], [word.replace("...", "X") for word in words[1:]])
    assert {word for word in words if word.startswith("--")} <= options, words


def test_every_page_is_read():
    pages = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md") if not path.is_relative_to(ROOT / "tests")]
    assert {page for page in pages if page[0] != "."} == {*DOCUMENTS, "LOG.md"}


def test_every_block_is_of_a_known_kind():
    kinds = [kind(block) for document in DOCUMENTS for block in blocks(document)]
    assert {name: kinds.count(name) for name in ("shell", "toml", "python")} == {"shell": 27, "toml": 5, "python": 2}
    assert {block.split()[0] for block in all_blocks("figure")} == FIGURES.keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    """Each link to a file of the repository names one, and one to a heading names a heading."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / document).read_text()):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_mentioned_commands_are_parsed():
    commands = mentioned_commands()
    assert len(commands) > 40
    for words in commands:
        parse(words)


WRONG_COMMANDS = ("cash CONFIG", "cache CONFIG --verfy", "plan --ram", "convert IN", "convert IN OUT --shard T")


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((AssertionError, KeyError, typer._click.exceptions.UsageError)):
        parse(command.split())


def test_other_programs_exist_and_have_the_options():
    """Scripts are in the repository, and their sources name each option."""
    lines = [line for block in all_blocks("shell") for line in block.splitlines() if line.split()[0] != "fastsd"]
    scripts, bench = 0, "".join(path.read_text() for path in ROOT.glob("bench/*.py"))
    for line in lines:
        words = [word for word in shlex.split(line.split("  ")[0].partition(" #")[0]) if not re.fullmatch(r"[A-Z_]+=\w+", word)]
        assert words[0] in NOT_RUN, line
        if words[0] == "python":
            module = words[1] == "-m"
            path = ROOT / (f"kernels/{words[2].replace('.', '/')}.py" if module else words[1])
            assert all(f'"{word}"' in bench + path.read_text() for word in words[2:] if word.startswith("--")), line
            scripts += 1
    assert scripts > 15


def config_fields() -> dict[str, object]:
    """Return the field of each config key: by "table.key", and by "key" alone for those of a stage."""
    fields = {}

    def add(table: type[BaseModel], prefix: str) -> None:
        for name, field in table.model_fields.items():
            key = prefix + (field.alias or name)
            fields[key] = field
            for inner in re.findall(r"\b(\w+Table)\b", str(field.annotation)):
                add(getattr(__import__("fastsd.config.schema", fromlist=[inner]), inner), f"{key}.")

    add(Config, "")
    return fields | {key.removeprefix("stage."): field for key, field in fields.items() if key.startswith("stage.")}


def test_keys_and_values_in_messages_exist():
    """A message that says `key = value` names a key of the config, and a value that it takes."""
    fields, dotted, valued = config_fields(), 0, 0
    by_name = {key.rpartition(".")[2]: field for key, field in fields.items()}
    tables = "model|data|cache|sample|validate|log|export|stage"
    for text in [
        *SENTENCES.values(),
        *(text for text in printed_texts() if " " in text and "\n" not in text and not SQL.search(text)),
    ]:
        for key in re.findall(rf"(?<![\w./`-])((?:{tables})(?:\.[a-z_]+)+)\b(?![(/])", text):
            dotted += 1
            assert key in fields or key.rpartition(".")[2] in SUFFIXES, (key, text)
        text = text.replace("{ unet = 1e-6, text_encoder = 3e-6 }", "")  # the keys of lr
        for key, value in re.findall(r"(?<![\w.])([a-z_][a-z_.]*) = (\"[\w.]+\"|true|false|\d[\d.e-]*)", text):
            if value != '"X"' and (field := fields.get(key) or by_name.get(key)):
                valued += 1
                TypeAdapter(field.rebuild_annotation()).validate_python(tomllib.loads(f"x = {value.rstrip('.')}")["x"])
    assert dotted > 100 and valued > 25, (dotted, valued)


class World:
    """A folder in which the names of the documents exist: a small job, models, LoRA files and pictures."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_images(folder / "photos", 12)
        tiny = make_tiny_model(folder / "models/tiny", text_layers=4)
        path = job(folder, folder / "models/tiny", folder / "photos", "[validate]\nheld_out = 4\nbands = 2\n" + STAGES)
        (folder / "configs").mkdir()
        text = path.read_text().replace(str(folder / "run"), "runs/xlsd").replace(str(folder / "cache"), "cache/xlsd")
        (folder / "configs/xlsd.toml").write_text(text)
        add_lora(tiny, BOTH, 0)
        write_lora(folder / "style.safetensors", tiny, names="kohya", metadata={})
        (prompts,) = all_blocks("prompts")
        (folder / "prompts.txt").write_text(prompts.replace("768", "32").replace("512", "16") + "\n")
        (folder / "config.toml").write_text(
            'pretrained_model_name_or_path = "models/tiny"\ntrain_data_dir = "photos"\noutput_dir = "runs/kohya"\n'
            'learning_rate = 1e-5\noptimizer_type = "Lion"\nmax_train_steps = 10\n'
        )
        # Files of other tools are read with SD1.5's numbers of heads and norm groups.
        cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=1, cross_attention_dim=64)
        model = make_tiny_model(folder / "models/old", cfg)
        model.vae.module = tiny_vae(groups=32, width=32)
        single_file(folder / "old.safetensors", model)
        torch.save({"state_dict": load_file(folder / "old.safetensors")}, folder / "old.ckpt")
        (folder / "config.toml").write_text('pretrained_model_name_or_path = "models/tiny"\n')  # of sd-scripts
        tiny_vae(factor=0.13025, seed=1).save_pretrained(folder / "sdxl-vae")
        add_lora(model, BOTH, 0)
        move(model)
        for name in ("lora", "a", "b"):
            write_lora(folder / f"{name}.safetensors", model, names="kohya", metadata={})

    def words(self, line: str) -> list[str]:
        """Return a command of a document with names of this folder."""
        names = {
            "CONFIG": "configs/xlsd.toml",
            "MODEL": "models/tiny",
            "BASE": "models/tiny",
            "FOLDER": "models/tiny/tokenizer",
        }
        for text, replacement in {
            "[--start T]": "--start 100",
            "[xl.toml]": "",
            "768": "32",
            "512": "16",
            "--gpus 8": "--gpus 2",
        }.items():
            line = line.replace(text, replacement)
        words = command_of(line)
        quick = {"lr-probe": ["--steps", "40"], "swap-vae": ["--resolution", "32"]}.get(words[1], [])
        return [names.get(word, f"{words[1]}-out" if word == "OUT" else word) for word in words[1:]] + quick


STAGES = """
[[stage]]
name = "unet"
train = ["unet"]
until = 2
batch = 4
optimizer = "dlion"
ema = { sigma_rel = [0.05, 0.10] }
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_commands_of_the_pages_run_in_their_order(world, monkeypatch, capsys):
    monkeypatch.chdir(world.folder)
    lines = [line.strip() for page in PAGES for block in blocks(page) if kind(block) == "shell" for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("fastsd ") and " ".join(line.split()[:2]) not in NOT_RUN]
    assert len(lines) == 36
    for line in lines:
        if "runs/a" in line and not Path("runs/a").exists():
            for name in ("a", "b"):
                shutil.copytree("runs/xlsd", f"runs/{name}")
        print(line)
        code, out, err = fastsd(*world.words(line), monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, (line, out, err)
    for path in (
        "report.html",
        "xlsd.safetensors",
        "sd15/unet",
        "style/unet",
        "lora-peft.safetensors",
        "xl-start/vae",
        "xl.toml",
    ):
        assert Path(path).exists(), path


def message_commands() -> list[list[str]]:
    spans = {" ".join(span.split()) for text in printed_texts() for span in re.findall(r"`fastsd ([^`]+)`", text)}
    return list(map(shlex.split, sorted(spans)))


def with_values(words: list[str]) -> list[str]:
    """Return the words of a command with values in the places of X, if `VALUES` has any."""
    values = iter(VALUES.get(" ".join(words), []))
    return [next(values, word) if word == "X" else word for word in words]


def test_commands_in_messages_have_the_config_as_it_was_given():
    """CONFIG becomes the path, overrides and precision of the command line, quoted for a shell."""
    group, console = command_group(), Console(file=StringIO())
    words = ["my configs/it's.toml", 'stage.0.train=["unet", "text_encoder"]', "run=a b"]
    console.name_config(words, "bf16")
    messages = [message for message in message_commands() if "CONFIG" in message]
    assert {message[0] for message in messages} >= {"cache", "plan", "train"}
    for name, *others in ([word for word in with_values(message) if word != "..."] for message in messages):
        (command,) = re.findall("`(.*)`", console.copyable(f"run `{shlex.join(['fastsd', name, *others])}` first"))
        context = group.commands[name].make_context(name, shlex.split(command)[2:])
        assert context.params["config"] == Path(words[0])
        overrides = context.params["values" if name == "sweep" else "overrides"]
        assert overrides == words[1:] + [word for word in others if "=" in word]
        assert context.params.get("precision") in (["bf16"] if name != "cache" else [None])
    # A command is not named without the config that it needs.
    bare = [name for text in printed_texts() for name in re.findall(r"\brun `fastsd ([a-z-]+)`", text)]
    takes_config = {name for name, command in group.commands.items() if "config" in [p.name for p in command.params]}
    assert not takes_config & set(bare)


ADVICE = {
    "CONFIG": "configs/xlsd.toml", "RUN": "runs/advice", "RUN/set-aside-1": "runs/advice/set-aside-1",
    "FOLDER": "runs/advice/model", "MODEL": "models/tiny", "FILE": "style.safetensors", "X": "models/tiny",
    "key=a,b,c": "seed=1,2", "model.vae=XX": "model.vae=sdxl-vae", "model.vae=X": "model.vae=sdxl-vae", "VAE": "sdxl-vae",
    "DIR": "photos",
}  # fmt: skip
VALUES = {  # of what varies in commands with several such words
    "convert X X": ["models/tiny", "OUT"], "convert MODEL OUT --merge X": ["style.safetensors"],
    "swap-vae X X OUT": ["models/tiny", "sdxl-vae"], "swap-vae X X OUT --images DIR": ["models/tiny", "sdxl-vae"],
    "check X": ["configs/xlsd.toml"], "train CONFIG --from X": ["step-00000001"],
    "plan CONFIG --gpus X --machines X": ["2", "1"],
}  # fmt: skip


@pytest.mark.slow
def test_commands_in_messages_run(world, monkeypatch, capsys):
    """Each command with arguments that fastsd prints as advice ends without an error."""
    monkeypatch.chdir(world.folder)
    commands = [words for words in message_commands() if words[1:] and words[1] in ADVICE]
    commands = [words for words in commands if f"fastsd {words[0]}" not in NOT_RUN]
    assert len(commands) >= 10
    run = ["run=runs/advice", "stage.checkpoint_every=1"]
    first = (["cache", "CONFIG"], ["train", "CONFIG", *run], ["train", "CONFIG", "--from", "X"])
    for number, words in enumerate([*first, *commands]):
        words = with_values(words) + run * ("--from" in words)
        names = ADVICE | {"OUT": f"advice-{number}", "OUT.safetensors": f"advice-{number}.safetensors"}
        line = [names.get(word, word) for word in words if word != "..."]
        code, out, err = fastsd(*line, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, (line, out, err)


SMALL = {"resolution": 16, "buckets": {"min": 8, "max": 24, "step": 8}}
VALIDATION = {"held_out": 4, "stabilised": 4, "bands": 2, "per_band": 1}


def test_toml_blocks_are_configs_that_train(world, monkeypatch):
    """Each block is accepted as it is, in a config with the other tables, and a small version of it trains."""
    monkeypatch.chdir(world.folder)
    write_images(world.folder / "art", 5, seed=1)
    shutil.copy("photos/0000.png", "photos/0001-mask.png")
    Path("art/metadata.jsonl").write_text('{"file_name": "0000.png", "text": "red", "weight": 2.0}\n')
    Path("set").mkdir()
    with tarfile.open("set/00000.tar", "w") as tar:
        for path in sorted(Path("photos").glob("000[2-7].*")):
            tar.add(path, path.name)
    for number, block in enumerate(all_blocks("toml")):
        table = {"run": f"runs/toml-{number}", "model": {"base": "models/tiny"}, "data": {"folders": ["photos"]}}
        table |= {"cache": {"dir": f"cache/toml-{number}"}} | tomllib.loads(block)
        table["stage"] = [{"train": ["unet"], "until": 1, "ema": 0.5} | stage for stage in table.get("stage", [{}])]
        parse_config(table, "block")
        table["data"] |= {key: value for key, value in SMALL.items() if key in table["data"] or key == "resolution"}
        table["data"]["folders"] = json.loads(json.dumps(table["data"]["folders"]).replace("{00000..00099}", "{00000..00000}"))
        if "sample" in table:
            table["sample"] = json.loads(json.dumps(table["sample"]).replace("768", "32").replace("512", "16"))
        if "validate" in table:
            table["validate"] = {key: VALIDATION[key] for key in table["validate"]} | VALIDATION
        for stage in table["stage"]:
            stage |= {"until": 1, "batch": 2}
        config, console = parse_config(table, "block"), Console(file=StringIO())
        build(config, console)
        check(config, console)
        train(config, console)
        assert (Path(config.run) / "model/unet").is_dir()


def test_python_blocks_run(world, monkeypatch):
    monkeypatch.chdir(world.folder)
    build(load_config("configs/xlsd.toml"), Console(file=StringIO()))
    for block in all_blocks("python"):
        namespace = vars(ModuleType("block"))
        exec(block, namespace)
        if "latents" in namespace:
            assert namespace["latents"].shape == (3, 4, 8, 8)
