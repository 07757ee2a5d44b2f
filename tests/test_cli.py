"""The command line: instant help, the commands cache, train and sample, and one sentence and exit code 2 for bad input."""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO

import pytest
import torch
import typer
from commandline import STAGE, fastsd
from sentences import refused, says
from tiny import job, tiny_vae, write_images

from fastsd import __version__, cli
from fastsd.commands.check import check
from fastsd.config.schema import load_config
from fastsd.terminal.console import Console


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr("fastsd.train.device.INTERPRETED", False)  # as for a user
    return lambda *words: fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)


def test_help_is_instant():
    command = [sys.executable, "-c", "import sys; sys.argv = ['fastsd', '--help']\nfrom fastsd.cli import main\nmain()"]
    subprocess.run(command, capture_output=True)
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    print(f"--help took {time.perf_counter() - start:.2f} s")
    assert process.returncode == 0
    assert all(word in process.stdout for word in ("train", "cache", "sample", "check", "demo"))
    code = "import sys; from fastsd import cli; assert not {'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


COMMANDS = typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_terminal_and_has_examples(run, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(*([name] if name else []), "-h")
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80
    assert name or not any(line.endswith("...") for line in lines[1:])  # a summary that is cut
    examples = out.partition("Examples:\n")[2].splitlines()
    assert examples and all(line.startswith(f"  fastsd {name}".rstrip()) or not name for line in (x[2:] for x in examples))
    for line in examples:
        words = shlex.split(line.strip().split("  ")[0])
        try:
            COMMANDS[words[1]].make_context(words[1], words[2:])
        except typer.Exit:
            assert words[2:] == ["--help"]


def test_values_of_options_are_named():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if not getattr(parameter, "is_flag", False) and parameter.name not in ("help", "precision", "dtype", "to", "by"):
                assert parameter.metavar, f"{name} {parameter.name}"


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0 and out.startswith(f"fastsd {__version__}, torch {torch.__version__.partition('+')[0]}")


def test_shell_completion():
    environment = os.environ | {"_FASTSD_COMPLETE": "complete_bash", "COMP_WORDS": "fastsd conv", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['fastsd']; from fastsd.cli import app; app(prog_name='fastsd')"
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.split() == ["convert", "convert-config"]


def test_cache_train_sample(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    code, out, err = run("cache", path)
    assert code == 0 and says(out, "images-cached", cached=21, images=21), err
    code, out, _ = run("cache", path)
    assert says(out, "images-cached", encoded=0, present=21)
    code, out, _ = run("check", path)
    assert code == 0 and says(out, "check-passed", check="model") and says(out, "check-passed", check="cache")
    code, out, err = run("train", "--precision", "fp32", path, "log.every=1")
    assert code == 0, err
    facts = ("images", "cpu on cpu", "0.5", "21 of 21", "loss", "img/s", "ETA", "MiB", "saved")
    assert all(fact in out for fact in facts), out
    for model in (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / "step-00000002"):
        prompts = ("--prompt", "a", "--prompt", "b")
        code, _, err = run("sample", model, *prompts, "--steps", 2, "--images", 2, "--out", tmp_path / "out")
        assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 * 5  # none replaces another
    for option in ("--verify", "--stats", "--prune"):
        assert run("cache", option, path)[0] == 0
    assert run("train", path)[0] == 0  # finished already


def test_bad_images_and_empty_captions_stop_nothing(run, tmp_path, tiny_model):
    folder = tmp_path / "images"
    write_images(folder, 6)
    (folder / "0001.png").write_bytes(b"not an image")
    (folder / "0002.txt").write_text("  \n")
    path = job(tmp_path, tiny_model, folder, STAGE)
    code, out, _ = run("cache", path)
    assert (
        code == 0
        and says(out, "images-cached", cached=5, images=6)
        and says(out, "images-rejected", count=1)
        and "0001.png" in out
    )
    assert says(out, "empty-captions", count=1)
    code, out, _ = run("train", path)
    assert code == 0 and "1 rejected" in out and "1 empty captions" in out


def test_paths_on_the_command_line_are_expanded(run, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    for written in ("~/x", "$PLACE/x", "${PLACE}/x"):
        for words in (
            ("check", written),
            ("convert", written, "out"),
            ("sample", written, "--prompt", "a"),
            ("compare", written),
            ("convert", tiny_model, tmp_path / "out", "--merge", f"{written}:0.5"),
        ):
            exit_code, _, err = run(*words)
            assert exit_code == 2 and str(tmp_path / "x") in err, (words, err)
    exit_code, _, err = run("check", "${UNSET}/x.toml")
    assert exit_code == 2 and says(err, "path-variable", variable="UNSET")


def bad_commands(tmp_path, tiny_model, images):
    """Return (words of a command, code of its error, facts in the error's sentence) for commands with bad input."""
    path = job(tmp_path, tiny_model, images, STAGE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "only-bad").mkdir()
    (tmp_path / "only-bad" / "x.jpg").write_bytes(b"no")
    tiny_vae(channels=8).save_pretrained(tmp_path / "vae8")
    prompt = ("sample", tiny_model, "--prompt", "x")
    return [
        (("train", path, "sed=1"), "config-invalid", "sed:", "seed?"),
        (("train", path, "stage.0.batch=big"), "config-invalid", "stage.0.batch", "'big'", "(a str)"),
        (("train", tmp_path / "none.toml"), "config-missing", "none.toml"),
        (("cache", path, 'data.folders=["/no/such/folder"]'), "folder-missing", "/no/such/folder"),
        (("cache", path, f'data.folders=["{tmp_path / "empty"}"]'), "folder-empty", str(tmp_path / "empty")),
        (("cache", path, f'data.folders=["{tmp_path / "only-bad"}"]'), "cache-no-usable-image", " 1 "),
        (("cache", path, "model.base=/no/such/model"), "source-missing", "/no/such/model"),
        (("train", path, f"model.vae={tmp_path / 'vae8'}"), "vae-channels", " 8 "),
        (("train", path, f"cache.dir={tmp_path / 'elsewhere'}"), "no-view", "elsewhere"),
        (("train", path, "kernels=triton"), "triton-cannot-run", "NVIDIA", "cpu"),
        (("train", path, "device=abacus"), "device-unavailable", "'abacus'"),
        (("train", path, "log.wandb=x"), "wandb-missing"),
        (("train", path, "sample.size=33"), "sample-size", "33", " 4 px"),
        (("train", path, "sample.prompts_file=/no/prompts"), "prompts-unreadable", "/no/prompts"),
        (("cache", path, "data.resolution=33"), "cache-resolution", "data.resolution", "33"),
        (("sample", tiny_model), "sample-no-prompt"),
        (("sample", "/no/model", "--prompt", "x"), "source-missing", "/no/model"),
        ((*prompt, "--sampler", "best"), "sample-option", "--sampler", "'best'", "'euler'"),
        ((*prompt, "--size", "30"), "sample-size", "30"),
        ((*prompt, "--vae-scaling-factor", "-1"), "sample-option", "--vae-scaling-factor", "-1.0"),
    ]


@pytest.mark.parametrize("number", range(20))
def test_bad_input_gets_one_sentence_and_exit_2(number, run, tmp_path, tiny_model, images):
    assert run("cache", job(tmp_path, tiny_model, images, STAGE))[0] == 0
    words, error, *facts = bad_commands(tmp_path, tiny_model, images)[number]
    code, out, err = run(*words)
    print(err)
    assert code == 2
    assert says(err, error) and all(fact in err for fact in facts)
    assert "Traceback" not in err + out
    assert len(err.strip().splitlines()) == 1


def test_check_reports_several_problems_at_once(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    code, out, err = run("check", path, "data.folders=['/no/such']", "model.base=/no/model", "device=abacus")
    assert code == 2 and says(out, "check-failed", check="model")
    facts = {"device": "abacus", "images": "/no/such", "model": "/no/model"}
    for title, fact in facts.items():
        assert fact in err and re.search(f"^error {title}: .*{fact}", out, re.MULTILINE)  # the reason stands beside it
    out = StringIO()
    with refused("check-problems-shown", count=len(facts)):
        options = ["data.folders=['/no/such']", "model.base=/no/model", "device=abacus"]
        check(load_config(path, options), Console(file=out, width=200, force_terminal=True))
    assert all(fact in out.getvalue() for fact in facts.values())


def test_check_goes_on_after_unknown_keys_and_wrong_values_of_a_stage(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    wrong = ["stage.0.btach=4", "model.bsae=x", "stage.0.grad_clip=tall", "learning_rate=1"]
    sentences = {"btach: unknown key", "bsae: unknown key", "grad_clip is 'tall'", "learning_rate: unknown key"}
    code, out, err = run("check", path, *wrong, "data.folders=['/no/such']")
    assert code == 2 and says(out, "check-failed", check="images") and says(out, "check-passed", check="model")
    for text in (*sentences, "/no/such"):
        assert text in err
    for sentence in sentences:
        assert re.search(f"^error config: .*{sentence}", out, re.MULTILINE)
    code, out, err = run("check", path, "stage.0.btach=4", "data.resolution=tall")  # with the default, the cache is another one
    assert code == 2 and "btach" in err and "data.resolution is 'tall'" in err and not says(out, "check-passed")


def test_check_and_a_run_name_prompts_that_are_cut_and_a_missing_license(run, tmp_path, tiny_model, images):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    path = job(tmp_path, base, images, STAGE)
    assert run("cache", path)[0] == 0
    prompts = f"sample.prompts=[{', '.join(['red'] * 76)!r}, 'a --w 16']"
    for command in ("check", "train"):
        code, out, _ = run(command, path, prompts)
        assert code == 0 and says(out, "prompt-cut", capacity=75) and says(out, "prompt-options-as-text", prompt="'a --w 16'")
        assert "shorten it, or set chunks to" in out and says(out, "license-not-set", license="mit", same="mit")
    _, out, _ = run("train", path, prompts, "stage.until=3")  # a run that has started keeps its chunks
    assert says(out, "prompt-cut", capacity=75) and "set chunks to" not in out
    _, out, _ = run("check", path, prompts, "model.chunks=8", "export.license=mit")
    assert not says(out, "prompt-cut") and not says(out, "license-not-set")


def test_check_refuses_a_disk_too_small_for_the_run(run, tmp_path, tiny_model, images, monkeypatch):
    path = job(tmp_path, tiny_model, images, STAGE)
    assert run("cache", path)[0] == 0
    code, out, _ = run("check", path, "model.clip_skip=1")
    assert code == 0 and says(out, "clip-skip-counts", clip_skip=1, place="2nd", others=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    code, out, err = run("check", path)
    assert code == 2 and says(out, "check-failed", check="run folder")
    assert says(err, "run-disk-space", run=f"'{tmp_path / 'run'}'", free="0.1 MiB") and err.count("\n") == 1


def test_usage_errors_exit_2(run):
    for words in (("trian",), ("train",), ("train", "--precision", "fp16", "x.toml")):
        code, _, err = run(*words)
        assert code == 2 and "Usage" in err


def test_one_of_torchruns_processes_prints_an_error_of_all(run, tmp_path, monkeypatch):
    (tmp_path / "job.toml").write_text("btach = 4")
    train = "train", tmp_path / "job.toml"
    monkeypatch.setattr("fastsd.commands.arguments._LATER", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    code, _, err = run(*train)  # without WORLD_SIZE, this is the only process
    assert code == 2 and "btach" in err

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run(*train) == run("lr-probe", "job.toml") == (2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, err = run("lr-probe", "job.toml")
    assert code == 2 and says(err, "ranks-command", command="lr-probe", ranks=2)
    assert "btach" in run("cache", tmp_path / "job.toml")[2]  # which several processes share
    for option in ("--verify", "--prune", "--stats", "--audit"):
        code, _, err = run("cache", tmp_path / "job.toml", option)
        assert code == 2 and says(err, "ranks-command", command=f"cache {option}", ranks=2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_is_one_sentence(number, run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))

    monkeypatch.setattr("fastsd.config.schema.load_config", fail)
    code, _, err = run("train", tmp_path / "job.toml")
    assert code == 2 and err.count("\n") == 1
    assert says(err, "disk-fails", path=tmp_path / "file", strerror=os.strerror(number))


def test_other_errors_of_the_system_are_ours(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsd.config.schema.load_config", lambda *_: (tmp_path / "missing").read_text())
    with pytest.raises(FileNotFoundError):
        run("train", tmp_path / "job.toml")


def test_a_signal_before_a_command_is_chosen_is_one_line(run, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGTERM))
    code, _, err = run("train")
    assert code == 130 and says(err, "command-stopped-early") and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_exit_has_no_traceback(number):
    """It arrives when the command has ended, while Python takes its modules apart."""
    ending = f"import atexit, os, time\natexit.register(lambda: (os.kill(os.getpid(), {number}), time.sleep(9)))"
    command = f"{ending}\nimport sys; sys.argv = ['fastsd', '--help']\nfrom fastsd.cli import program\nprogram()"
    process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert process.returncode == -number and process.stderr == "" and "COMMAND" in process.stdout


def test_commands_in_messages_can_be_copied(run, tmp_path, tiny_model, images, monkeypatch):
    """A refusal and a warning name the config, with its overrides, as they are on this command line."""
    (tmp_path / "my jobs").mkdir()
    job(tmp_path / "my jobs", tiny_model, images, STAGE)
    monkeypatch.chdir(tmp_path)
    words = ("my jobs/job.toml", "cache.dir=new cache", "data.folders=['my photos']")
    write_images(tmp_path / "my photos", 4)
    code, _, err = run("train", "--precision", "bf16", *words)
    (command,) = re.findall("`(.*)`", err)
    assert code == 2 and says(err, "no-view") and shlex.split(command) == ["fastsd", "cache", *words]
    assert run(*shlex.split(command)[1:])[0] == 0
    write_images(tmp_path / "my photos", 5)
    _, out, _ = run("check", *words)
    assert says(out, "folders-changed", CONFIG=shlex.join(words))
    _, out, _ = run("check", *words, "data.folders=['none']")
    assert ", 2 steps with 2 images per step" in out  # although the number of images is unknown
