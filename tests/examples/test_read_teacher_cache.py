"""The reader to copy: numpy alone, twenty lines, and what it reads is what the package reads."""

import io
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

from mohawk.cache_teacher import write_cache
from mohawk.data import PackedDataset
from tests.mohawk.conftest import make_llama  # noqa: F401
from tests.mohawk.tiny_teacher import LENGTH, documents

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read_teacher_cache.py"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "k"), [("top-k", 7), ("top-k", 1), ("top-k", 258), ("samples", 12), ("hidden", 1)])
def test_it_reads_what_the_package_reads(tmp_path, make_llama, kind, k, dtype):  # noqa: F811
    dataset = PackedDataset(documents(tmp_path), LENGTH, seed=3)
    teacher = make_llama(1).to(dtype)
    cache = write_cache(tmp_path / "cache", teacher, dataset, kind=kind, k=k, draws=k, rows_per_shard=4, rows=7)
    # Without site-packages but numpy's: nothing else can be what does the work.
    code = (
        "import sys, runpy; import numpy as np\n"
        f"read_row = runpy.run_path({str(EXAMPLE)!r})['read_row']\n"
        f"np.savez({str(tmp_path / 'rows.npz')!r}, **{{f'{{name}} {{i}}': values for i in range(7) "
        f"for name, values in read_row({str(tmp_path / 'cache')!r}, i).items()}})\n"
        "assert not {'torch', 'mohawk', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    found = np.load(tmp_path / "rows.npz")
    names = {"teacher_ids": "ids", "teacher_logprobs": "logprobs", "teacher_tail": "tail", "teacher_hidden": "hidden"}
    for index in range(7):
        for name, values in cache.row(index).items():
            if name == "teacher_weights":
                assert (values == 1 / k).all()
                continue
            theirs = found[f"{names[name]} {index}"]
            if values.dtype == torch.bfloat16:
                values = values.view(torch.uint16)
            np.testing.assert_array_equal(theirs.astype(values.numpy().dtype), values.numpy())


def test_it_has_twenty_lines_of_code():
    source = EXAMPLE.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in ignored]
    lines = {line for t in tokens[1:] for line in range(t.start[0], t.end[0] + 1)}  # but the docstring
    assert len(lines) <= 20
