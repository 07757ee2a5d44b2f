"""The choice of a device, with stand-ins for drivers, builds of torch and compilers."""

import errno
import subprocess
import sys
import sysconfig
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from commandline import STAGE, fastsd
from dataset import job
from sentences import refused, says
from triton.runtime.build import compile_module_from_src

from fastsd.train import device as devices
from fastsd.train.device import CUDA_WHEELS, choose_device, choose_ops
from fastsd_kernels import REFERENCE, TRITON

CARD = "NVIDIA GeForce RTX 4090"
BASE_VERSION = torch.__version__.split("+")[0]


def too_old() -> None:
    raise RuntimeError(
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.\nMore."
    )


# Situation -> (CUDA version of torch, GPU that the driver knows, CUDA_VISIBLE_DEVICES, torch.cuda.init, facts in the line).
SITUATIONS = {
    "no card": (None, None, None, None, "no NVIDIA GPU found, and torch", "built without CUDA"),
    "no driver": ("13.0", None, None, None, "no NVIDIA GPU found; install NVIDIA's driver", "nvidia-smi"),
    "torch without CUDA": (
        None, CARD, None, None, f"built without CUDA and cannot use the {CARD}",
        f'`pip install "torch=={BASE_VERSION}+{CUDA_WHEELS}" --extra-index-url https://download.pytorch.org/whl/{CUDA_WHEELS}`',
    ),
    "old driver": ("13.0", CARD, None, too_old, f"cannot use the {CARD} (The NVIDIA driver on your system is too old",
                   "update NVIDIA's driver to one for CUDA 13.0"),
    "hidden": ("13.0", CARD, "", None, f"CUDA_VISIBLE_DEVICES is '' and hides the {CARD}; unset it"),
}  # fmt: skip


@pytest.fixture(params=SITUATIONS)
def situation(request, monkeypatch):
    """Simulate a machine without a usable GPU, and return the facts that a message must contain."""
    cuda, card, visible, init, *facts = SITUATIONS[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init or (lambda: None))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "_installed_card", lambda: card)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return facts


def test_each_command_says_why_it_runs_on_the_cpu(situation, tmp_path, tiny_model, images, monkeypatch, capsys):
    def run(*words):
        code, out, err = fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err
        return [line for line in out.splitlines() if says(line, "runs-on-the-cpu")]

    path = job(tmp_path, tiny_model, images, STAGE)
    sample = ("sample", tiny_model, "--prompt", "x", "--steps", 1, "--out", tmp_path / "samples")
    for words in (("cache", path), ("check", path), ("train", path), sample):
        (line,) = run(*words)
        assert line.startswith("warning: ") and all(fact in line for fact in situation)
    assert not run("cache", path, "device=cpu") and not run(*sample, "--device", "cpu")


def test_an_explicit_gpu_that_is_missing_is_an_error(situation):
    for name in ("cuda", "cuda:1"):
        with refused("gpu-missing", name=repr(name)) as info:
            choose_device(name)
        assert all(fact in str(info.value) for fact in situation)
    with refused("device-unavailable", device="'abacus'"):
        choose_device("abacus")


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    """Graphs, kernels and events use the current GPU, whatever the device of their tensors."""
    chosen, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))
    assert choose_device("cuda:1") == torch.device("cuda", 1) and chosen == [torch.device("cuda", 1)]
    assert choose_device("cuda").index is None and choose_device("cpu").type == "cpu" and len(chosen) == 1


@pytest.mark.parametrize("answer, card", [(f"{CARD}\nNVIDIA A100\n", CARD), ("", None)])
def test_the_first_card_of_nvidia_smi_counts(answer, card, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(stdout=answer, command=command))
    assert devices._installed_card() == card


@pytest.mark.parametrize("failure", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 30)])
def test_the_library_of_the_driver_answers_if_nvidia_smi_does_not(failure, monkeypatch):
    def fail(*arguments, **options):
        raise failure

    class Driver:
        count, status = 1, 0

        def cuInit(self, flags):
            return self.status

        def cuDeviceGetCount(self, count):
            count._obj.value = self.count
            return 0

        def cuDeviceGetName(self, name, size, number):
            name.value = CARD.encode()
            return 0

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(devices.ctypes, "CDLL", fail)
    if isinstance(failure, OSError):
        assert devices._installed_card() is None
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver())
    assert devices._installed_card() == CARD
    Driver.count = 0
    assert devices._installed_card() is None
    Driver.count, Driver.status = 1, 100
    assert devices._installed_card() is None


class Gpu:
    """A GPU on which kernels fail with an error."""

    def __init__(self, monkeypatch, capability=(8, 9), error: Exception | None = None) -> None:
        self.kernels = 0
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
        for name, value in {
            "get_device_capability": capability, "get_device_name": CARD, "synchronize": None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(devices, "TRITON", replace(TRITON, geglu=self.geglu))
        monkeypatch.setattr(devices, "fastest", lambda device: devices.TRITON)
        self.error = error

    def geglu(self, x):
        self.kernels += 1
        if self.error:
            raise self.error


def test_a_kernel_starts_before_the_table_is_used(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert choose_ops("auto", torch.device("cuda")) is choose_ops("triton", torch.device("cuda")) is devices.TRITON
    assert gpu.kernels == 2
    assert choose_ops("reference", torch.device("cuda")) is REFERENCE and gpu.kernels == 2


@pytest.mark.parametrize("capability, name", [((7, 5), "7.5"), ((6, 1), "6.1")])
def test_old_cards_are_refused_in_one_sentence(capability, name, monkeypatch):
    gpu = Gpu(monkeypatch, capability)
    for kernels in ("auto", "triton"):
        with refused("gpu-unsupported", card=CARD, generation=f"has compute capability {name}", oldest=8.0):
            choose_ops(kernels, torch.device("cuda"))
    assert choose_ops("reference", torch.device("cuda")) is REFERENCE and not gpu.kernels
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with refused("gpu-unsupported", generation="is no NVIDIA GPU"):
        choose_ops("auto", torch.device("cuda"))


def build_error(monkeypatch, tmp_path) -> Exception:
    """Return the error with which Triton fails to build its launcher here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "empty"))
    with triton.knobs.cache.scope(), pytest.raises(Exception) as info:
        triton.knobs.cache.dir = str(tmp_path / "empty")
        compile_module_from_src("#include <Python.h>\nint wrong = missing;", "launcher")
    return info.value


def problem_of(error: Exception, monkeypatch) -> str:
    Gpu(monkeypatch, error=error)
    with refused("kernel-start", card=CARD) as info:
        choose_ops("auto", torch.device("cuda"))
    return str(info.value)


def test_a_missing_compiler_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = problem_of(build_error(monkeypatch, tmp_path), monkeypatch)
    assert "there is no C compiler" in text and f"gcc python{sys.version_info.major}.{sys.version_info.minor}-dev" in text


def test_missing_headers_are_named_with_their_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme=None: {"include": str(tmp_path)})
    text = problem_of(build_error(monkeypatch, tmp_path), monkeypatch)
    assert "Python's header files are missing" in text and "python3." in text and "-dev`" in text


def test_a_failing_compiler_is_named(monkeypatch, tmp_path):
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme=None: {"include": str(tmp_path)})
    assert "failed with exit status 1; see its messages above" in problem_of(build_error(monkeypatch, tmp_path), monkeypatch)


@pytest.mark.parametrize(
    "error, facts",
    [
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), ("libcuda.so.1", "`sudo ldconfig`")),
        (PermissionError(errno.EACCES, "Permission denied", "/x/.triton"), ("/x/.triton: Permission", "TRITON_CACHE_DIR")),
        (OSError(errno.ENOSPC, "No space left on device"), ("No space left on device", "TRITON_CACHE_DIR")),
        (RuntimeError("Triton Error [CUDA]: invalid device image\nat x"), ("invalid device image; update",)),
        (RuntimeError(), ("RuntimeError; update",)),
    ],
)
def test_other_failures_of_the_first_kernel_are_sentences(error, facts, monkeypatch):
    text = problem_of(error, monkeypatch)
    assert all(fact in text for fact in facts) and "\n" not in text


@pytest.mark.parametrize(
    "platform, release, limit",
    [("linux", "6.8.0-generic", None), ("win32", "10", 0.75), ("linux", "5.15.167-microsoft-standard-WSL2", 0.75)],
)
def test_windows_drivers_cannot_move_memory_to_the_host(platform, release, limit, monkeypatch):
    """Free are 60 % of the memory; PyTorch itself has reserved 15 %."""
    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    monkeypatch.setattr(devices.sys, "platform", platform)
    monkeypatch.setattr(devices.platform, "release", lambda: release)
    assert choose_device("auto") == torch.device("cuda")
    assert limits == ([] if limit is None else [limit])
