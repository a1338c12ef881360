"""The reader to copy: numpy alone, twenty lines, and what it reads is what the package reads."""

import io
import runpy
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

from mohawk.data.packing import PackedDataset
from mohawk.teacher_cache.writer import write_cache
from tests.helpers.tiny_teacher import LENGTH, documents
from tests.mohawk.conftest import make_llama  # noqa: F401

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read_teacher_cache.py"


CASES = [("top-k", 7), ("top-k", 1), ("top-k", 258), ("samples", 12), ("hidden", 1)]


@pytest.fixture
def cached(tmp_path, make_llama):  # noqa: F811
    def write(kind, k, dtype=torch.float32):
        dataset = PackedDataset(documents(tmp_path), LENGTH, seed=3)
        teacher = make_llama(1).to(dtype)
        return write_cache(tmp_path / "cache", teacher, dataset, kind=kind, k=k, draws=k, rows_per_shard=4, rows=7)

    return write


@pytest.mark.parametrize(("kind", "k", "dtype"), [*((*c, torch.float32) for c in CASES), ("hidden", 1, torch.bfloat16)])
def test_it_reads_what_the_package_reads(cached, kind, k, dtype):
    cache = cached(kind, k, dtype)
    read_row = runpy.run_path(str(EXAMPLE))["read_row"]
    names = {"teacher_ids": "ids", "teacher_logprobs": "logprobs", "teacher_tail": "tail", "teacher_hidden": "hidden"}
    for index in range(7):
        columns = cache.row(index)
        if kind == "samples":
            assert (columns.pop("teacher_weights") == 1 / k).all()
        theirs = read_row(str(cache.folder), index)
        assert theirs.keys() == {names[name] for name in columns}
        for name, values in columns.items():
            values = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
            np.testing.assert_array_equal(theirs[names[name]].astype(values.dtype), values)


def test_it_needs_numpy_alone(cached):
    folder = cached("top-k", 5).folder
    code = (
        f"import runpy, sys; runpy.run_path({str(EXAMPLE)!r})['read_row']({str(folder)!r}, 6)\n"
        "assert 'numpy' in sys.modules and not {'torch', 'mohawk', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_it_has_twenty_lines_of_code():
    source = EXAMPLE.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in ignored]
    lines = {line for t in tokens[1:] for line in range(t.start[0], t.end[0] + 1)}  # but the docstring
    assert len(lines) <= 20
