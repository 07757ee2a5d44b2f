"""The order of CUDA calls of a captured function, on a stand-in for CUDA."""

from functools import partial

import pytest
import torch

from fastsd.errors import out_of_memory
from fastsd.train.graph import WARM_UP, Graphs


class Function:
    """Adds its arguments. `calls` counts the calls from Python, of which a replay makes none."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, a, b):
        self.calls += 1
        return (a + b,)


@pytest.fixture
def function():
    return Function()


def call(graphed, a: float, b: float, size: int = 1, dtype=torch.float32) -> list[float]:
    """Call a function with a row and a column of `size` numbers. Return its results, in which both occur."""
    device = torch.device("cuda")
    (result,) = graphed(
        torch.full((1, size), a, dtype=dtype, device=device), torch.full((size, 1), b, dtype=dtype, device=device)
    )
    return result.flatten().tolist()


def test_first_calls_run_eagerly_on_the_stream_of_the_capture(stand_in, function):
    graphed = partial(Graphs(), function)
    for i in range(WARM_UP):
        stand_in.calls.clear()
        assert call(graphed, i, 10, size=2) == [i + 10] * 4
        assert stand_in.calls == [
            "side waits for current", "enter side", "leave side", "current waits for side",
            "(1, 2) used by side", "(2, 1) used by side", "(2, 2) used by current",
        ]  # fmt: skip
    assert not stand_in.graphs and function.calls == WARM_UP


def test_one_capture_serves_all_later_calls(stand_in, function):
    graphed = partial(Graphs(), function)
    for i in range(WARM_UP):
        call(graphed, i, 10)
    stand_in.calls.clear()
    first, second = (torch.tensor([[x]], device="cuda") for x in (1.0, 2.0))
    (captured,) = graphed(first, second)
    assert stand_in.calls == ["empty cache", "enter current", "capture", "leave current", "replay 0"]
    assert function.calls == WARM_UP + 1
    assert stand_in.capture_options == [{"pool": None, "stream": "side", "capture_error_mode": "thread_local"}]
    stand_in.calls.clear()
    (replayed,) = graphed(*(torch.tensor([[x]], device="cuda") for x in (3.0, 4.0)))
    assert stand_in.calls == ["replay 0"] and function.calls == WARM_UP + 1
    # The results are copies, and so were the inputs.
    assert captured == 3 and replayed == 7 and first == 1 and second == 2


def test_a_new_shape_frees_the_other_graphs_while_it_runs_eagerly(stand_in, function):
    """The graphs' activations would lie beside those of the eager calls. The graphs are captured again without eager calls."""
    graphed = partial(Graphs(), function)
    for options in ({}, {"size": 2}, {"dtype": torch.float64}):
        stand_in.calls.clear()
        function.calls = 0
        for i in range(WARM_UP + 2):
            assert call(graphed, i, 1, **options) == [i + 1] * options.get("size", 1) ** 2
        assert function.calls == WARM_UP + 1 and stand_in.calls.count("capture") == 1
    assert [options["pool"] for options in stand_in.capture_options] == [None, None, None]
    stand_in.calls.clear()
    assert call(graphed, 5, 6, size=2) == [11] * 4 and call(graphed, 7, 8) == [15] and call(graphed, 1, 2, size=2) == [3] * 4
    assert [text for text in stand_in.calls if text.split()[0] in ("capture", "replay")] == [
        "capture", "replay 3", "capture", "replay 4", "replay 3",
    ]  # fmt: skip
    assert [options["pool"] for options in stand_in.capture_options[3:]] == ["pool of 2", "pool of 2"]


def test_freed_graphs_are_captured_again_and_forgotten_ones_run_eagerly_first(stand_in, function):
    graphs = Graphs()
    graphed = partial(graphs, function)
    for forget, eager_calls in ((False, WARM_UP), (True, 0), (False, WARM_UP)):
        stand_in.calls.clear()
        function.calls = 0
        for i in range(WARM_UP + 2):
            assert call(graphed, i, 1) == [i + 1]
        assert function.calls == eager_calls + 1 and stand_in.calls.count("capture") == 1
        graphs.free()
        if forget:
            graphs.forget()
    assert [options["pool"] for options in stand_in.capture_options] == [None, None, None]


def test_absent_arguments_stay_absent(stand_in):
    def function(a, b):
        assert b is None
        return (a + a,)

    graphs = Graphs()
    for i in range(WARM_UP + 3):
        (result,) = graphs(function, torch.tensor([float(i)], device="cuda"), None)
        assert result == 2 * i


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("no memory"), ValueError("a bug")])
def test_a_failed_capture_leaves_nothing_behind(cause, stand_in, function):
    """The end of a capture fails too. Its error still says that memory ran out."""
    graphs = Graphs()

    def failing_function(a, b):
        if graphs.capturing:
            raise cause
        return function(a, b)

    for i in range(WARM_UP):
        call(partial(graphs, failing_function), i, 10)
    stand_in.capture_error = RuntimeError("the capture cannot end")
    with pytest.raises(RuntimeError, match="the capture cannot end") as error:
        call(partial(graphs, failing_function), 0, 0)
    assert bool(out_of_memory(error.value)) == isinstance(cause, torch.OutOfMemoryError)
    assert function.calls == WARM_UP and "replay 0" not in stand_in.calls and not graphs.capturing
    # PyTorch leaves the stream of the capture, and its pool, as they were.
    assert torch.cuda.current_stream().name == "current"
    assert not any(pool.is_lost or pool.is_allocating for pool in stand_in.gpus[0].pools)
    assert call(partial(graphs, function), 3, 4) == [7]  # captured now, in a new pool
    assert stand_in.capture_options[-1]["pool"] is None


def test_a_failed_capture_frees_the_graphs_of_other_shapes(stand_in, function):
    graphs = Graphs()
    graphed = partial(graphs, function)
    for size in (1, 2):
        for _ in range(WARM_UP + 1):
            call(graphed, 1, 2, size)
    assert [graph() is not None for graph in stand_in.graphs] == [False, True]
    stand_in.capture_error = RuntimeError("the capture cannot end")
    with pytest.raises(RuntimeError, match="the capture cannot end"):
        call(graphed, 1, 2, size=1)
    assert stand_in.graphs[1]() is None
