"""The order of CUDA calls of a captured function, with stand-ins for streams and graphs: it needs no GPU."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fastsd.errors import out_of_memory
from fastsd.train.graph import WARM_UP, Graphs


class StandIn:
    """Streams and graphs that record calls.

    As on a GPU, a capture executes nothing, and a replay reads and writes the memory of the capture. `function` adds its
    arguments.
    """

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        self.capture_options: list[dict] = []
        self.graphs: list[StandIn.Graph] = []
        self.capturing: StandIn.Graph | None = None
        standin = self

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other) -> None:
                standin.calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def __init__(self) -> None:
                standin.graphs.append(self)

            def replay(self) -> None:
                standin.calls.append(f"replay {standin.graphs.index(self)}")
                self.execute()

            def pool(self) -> str:
                return f"pool of {standin.graphs.index(self)}"

        @contextmanager
        def stream(used):
            standin.calls.append(f"enter {used.name}")
            yield
            standin.calls.append(f"leave {used.name}")

        @contextmanager
        def graph(captured, **options):
            standin.calls.append("capture")
            standin.capture_options.append(options | {"stream": options["stream"].name})
            standin.capturing = captured
            yield
            standin.capturing = None

        current = Stream("current")
        names = {"Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": graph, "current_stream": lambda: current}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty cache"))
        record = lambda tensor, stream: self.calls.append(f"{tensor.tolist()} used by {stream.name}")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", record)

    def function(self, a, b):
        self.calls.append("function")
        if self.capturing is None:
            return (a + b,)
        result = torch.full_like(a, torch.nan)
        self.capturing.execute = lambda: result.copy_(a + b)
        return (result,)


@pytest.fixture
def gpu(monkeypatch):
    return StandIn(monkeypatch)


def call(graphed, a: float, b: float, size: int = 1, dtype=torch.float32) -> list[float]:
    (result,) = graphed(torch.full((size,), a, dtype=dtype), torch.full((size,), b, dtype=dtype))
    return result.tolist()


def test_first_calls_run_eagerly_on_the_stream_of_the_capture(gpu):
    graphed = partial(Graphs(), gpu.function)
    for i in range(WARM_UP):
        gpu.calls.clear()
        assert call(graphed, i, 10) == [i + 10]
        assert gpu.calls == [
            "side waits for current", "enter side", "function", "leave side", "current waits for side",
            f"[{i}.0] used by side", "[10.0] used by side", f"[{i + 10}.0] used by current",
        ]  # fmt: skip
    assert not gpu.graphs


def test_one_capture_serves_all_later_calls(gpu):
    graphed = partial(Graphs(), gpu.function)
    for i in range(WARM_UP):
        call(graphed, i, 10)
    gpu.calls.clear()
    first, second = torch.tensor([1.0]), torch.tensor([2.0])
    (captured,) = graphed(first, second)
    assert gpu.calls == ["empty cache", "capture", "function", "replay 0"]
    assert gpu.capture_options == [{"pool": None, "stream": "side", "capture_error_mode": "thread_local"}]
    gpu.calls.clear()
    (replayed,) = graphed(torch.tensor([3.0]), torch.tensor([4.0]))
    assert gpu.calls == ["replay 0"]
    # The results are copies, and so were the inputs.
    assert captured == 3 and replayed == 7 and first == 1 and second == 2


def test_a_new_shape_frees_the_other_graphs_while_it_runs_eagerly(gpu):
    """The graphs' activations would lie beside those of the eager calls. The graphs are captured again without eager calls."""
    graphed = partial(Graphs(), gpu.function)
    for options in ({}, {"size": 2}, {"dtype": torch.float64}):
        gpu.calls.clear()
        for i in range(WARM_UP + 2):
            assert call(graphed, i, 1, **options) == [i + 1] * options.get("size", 1)
        assert gpu.calls.count("function") == WARM_UP + 1 and gpu.calls.count("capture") == 1
    assert [options["pool"] for options in gpu.capture_options] == [None, None, None]
    gpu.calls.clear()
    assert call(graphed, 5, 6, size=2) == [11, 11] and call(graphed, 7, 8) == [15] and call(graphed, 1, 2, size=2) == [3, 3]
    assert [text for text in gpu.calls if text != "empty cache"] == [
        "capture", "function", "replay 3", "capture", "function", "replay 4", "replay 3",
    ]  # fmt: skip
    assert [options["pool"] for options in gpu.capture_options[3:]] == ["pool of 2", "pool of 3"]


def test_freed_graphs_are_captured_again_and_forgotten_ones_run_eagerly_first(gpu):
    graphs = Graphs()
    graphed = partial(graphs, gpu.function)
    for forget, eager_calls in ((False, WARM_UP), (True, 0), (False, WARM_UP)):
        gpu.calls.clear()
        for i in range(WARM_UP + 2):
            assert call(graphed, i, 1) == [i + 1]
        assert gpu.calls.count("function") == eager_calls + 1 and gpu.calls.count("capture") == 1
        graphs.free()
        if forget:
            graphs.forget()
    assert [options["pool"] for options in gpu.capture_options] == [None, None, None]


def test_absent_arguments_stay_absent(gpu):
    def function(a, b):
        assert b is None
        return gpu.function(a, a)

    graphs = Graphs()
    for i in range(WARM_UP + 3):
        (result,) = graphs(function, torch.tensor([float(i)]), None)
        assert result == 2 * i


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("no memory"), ValueError("a bug")])
def test_a_failed_capture_leaves_nothing_behind(cause, gpu, monkeypatch):
    """The end of a capture fails too. Its error still says that memory ran out."""
    graphs = Graphs()

    @contextmanager
    def failing_graph(graph, **options):
        try:
            yield
        finally:
            raise RuntimeError("the capture cannot end")

    def function(a, b):
        if graphs.capturing:
            raise cause
        return gpu.function(a, b)

    with monkeypatch.context() as failing:
        failing.setattr(torch.cuda, "graph", failing_graph)
        for i in range(WARM_UP):
            call(partial(graphs, function), i, 10)
        with pytest.raises(RuntimeError, match="the capture cannot end") as error:
            call(partial(graphs, function), 0, 0)
    assert bool(out_of_memory(error.value)) == isinstance(cause, torch.OutOfMemoryError)
    assert gpu.calls.count("function") == WARM_UP and "replay 0" not in gpu.calls and not graphs.capturing
    gpu.capturing = None
    assert call(partial(graphs, gpu.function), 3, 4) == [7]  # captured now, in a new pool
    assert gpu.capture_options[-1]["pool"] is None
