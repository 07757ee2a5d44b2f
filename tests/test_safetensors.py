"""Our safetensors files are read by the safetensors library, and its files by us."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsd.storage import DTYPES, TensorFile, safetensors_header, write_safetensors

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
ENTRIES = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=6)
METADATA = st.dictionaries(NAMES.filter(lambda name: name != "format"), NAMES, max_size=3)
FEW = settings(max_examples=30, deadline=None, derandomize=True)


def tensors_of(entries):
    """Make tensors of random bits. A boolean has one of two."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (dtype, shape) in entries.items():
        limit = 2 if dtype == torch.bool else 256
        bits = torch.randint(limit, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensors[name] = bits.view(dtype).view(shape)
    return tensors


def assert_same_bits(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        other = others[name].contiguous()
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert tensor.flatten().view(torch.uint8).tolist() == other.flatten().view(torch.uint8).tolist()


@FEW
@given(ENTRIES, METADATA)
def test_files_are_the_same_to_the_library_and_to_us(entries, metadata):
    tensors = tensors_of(entries)
    with tempfile.TemporaryDirectory() as folder:
        our_path, other_path = Path(folder, "ours"), Path(folder, "theirs")
        write_safetensors(our_path, tensors, metadata)
        save_file(tensors, other_path, {"format": "pt", **metadata})
        assert_same_bits(load_file(our_path), tensors)
        with safe_open(our_path, "pt") as file:
            assert file.metadata() == {"format": "pt", **metadata}
        for path in (our_path, other_path):
            assert TensorFile(path).metadata == {"format": "pt", **metadata}
            assert_same_bits(dict(TensorFile(path)), tensors)
            assert_same_bits({name: stored.read() for name, stored in TensorFile(path).stored().items()}, tensors)


@FEW
@given(ENTRIES, st.sampled_from([8, 64, 4096]))
def test_data_starts_at_a_multiple_of_the_alignment(entries, align):
    header = safetensors_header(entries, align=align)
    assert len(header) % align == 0 and len(header) == 8 + int.from_bytes(header[:8], "little")
    end = 0
    for name, entry in json.loads(header[8:]).items():
        if name != "__metadata__":
            start, end = end, end + entries[name][0].itemsize * torch.Size(entries[name][1]).numel()
            assert entry["data_offsets"] == [start, end]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "padded")
        path.write_bytes(header + bytes(end))
        assert {name: (t.dtype, tuple(t.shape)) for name, t in load_file(path).items()} == entries
