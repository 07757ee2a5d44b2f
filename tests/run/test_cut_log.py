"""The log of a run that was killed: complete rows up to the checkpoint remain, and the rest is written again."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.run.report import RowFile

VALUES = st.one_of(st.floats(allow_nan=False), st.integers(), st.text(max_size=5), st.none())
ROWS = st.lists(st.dictionaries(st.sampled_from(["loss", "lr", "stage"]), VALUES), min_size=1, max_size=5)
# What a file system may leave behind the last bytes that were flushed, and other JSON.
GARBAGE = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [
            '{"step": 0, "loss": "\xff"}\n'.encode("utf-16-be"),
            b"\0" * 9,
            b"7\n",
            b'{"step": null}\n',
            b"[" * 9999 + b"\n",
            b"\xff\n",
        ]
    ),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ROWS, st.data())
def test_a_log_cut_anywhere_resumes_with_the_same_bytes(rows, data):
    lines = [json.dumps({"step": number, **row}).encode() + b"\n" for number, row in enumerate(rows, start=1)]
    step = data.draw(st.integers(0, len(lines)))
    kept, whole = b"".join(lines[:step]), b"".join(lines)
    cut = data.draw(st.integers(len(kept), len(whole)))  # rows up to a checkpoint are on the disk before it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.jsonl")
        path.write_bytes(whole[:cut] + data.draw(GARBAGE))
        log = RowFile(path, step)
        assert path.read_bytes() == kept
        log.append(b"".join(lines[step:]).decode())
        assert path.read_bytes() == whole
