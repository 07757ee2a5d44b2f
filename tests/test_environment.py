"""The tests themselves are the same with and without a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import environment

SUPPORT, CONFTEST = Path(__file__).parent / "support", Path(__file__).parent / "conftest.py"


def test_a_gpu_is_hidden_from_tests_and_their_processes():
    facts = "os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda.is_available(), environment.DEVICE"
    program = f"import os, environment, torch; print({facts})"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(SUPPORT)}
    run = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert run.stdout == " False cpu\n", run.stderr


def test_tests_of_a_gpu_without_one_are_refused():
    """Otherwise every test would be skipped, and the run would pass."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/test_environment.py"]
    variables = os.environ | {"FASTSD_TEST_GPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=SUPPORT.parents[1], env=variables, capture_output=True, text=True)
    assert run.returncode == 4 and "FASTSD_TEST_GPU is set, but PyTorch has no GPU; unset it" in run.stderr


def test_only_tests_for_a_gpu_run_there(pytestconfig, monkeypatch):
    (conftest,) = [p for p in pytestconfig.pluginmanager.get_plugins() if getattr(p, "__file__", "") == str(CONFTEST)]
    deselected = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))

    def item(*markers):
        return SimpleNamespace(fixturenames=[], get_closest_marker=lambda name: name in markers)

    config = SimpleNamespace(hook=hook, option=SimpleNamespace(markexpr=""))
    on_gpu, kernels, other = item("gpu"), item("kernels", "slow"), item("slow")
    items = [on_gpu, kernels, other]
    conftest.pytest_collection_modifyitems(config, items)
    assert items == [on_gpu, kernels, other] and not deselected
    monkeypatch.setattr(environment, "ON_GPU", True)
    conftest.pytest_collection_modifyitems(config, items)
    assert items == [on_gpu, kernels] and deselected == [other]


def test_faults_for_hours_run_only_on_request(pytestconfig):
    (conftest,) = [p for p in pytestconfig.pluginmanager.get_plugins() if getattr(p, "__file__", "") == str(CONFTEST)]
    for expression, expected in (("", 1), ("not slow", 1), ("hours", 2)):
        items = [SimpleNamespace(fixturenames=[], get_closest_marker=names.__contains__) for names in (["hours"], ["slow"])]
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        config = SimpleNamespace(hook=hook, option=SimpleNamespace(markexpr=expression))
        conftest.pytest_collection_modifyitems(config, items)
        assert len(items) == expected
