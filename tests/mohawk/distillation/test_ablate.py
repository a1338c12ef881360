"""What `mohawk ablate` prints is readable in a terminal of 80 columns."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mohawk.core.json_files import read_json, write_json
from mohawk.core.run_folder import RESULTS
from mohawk.distillation.ablate import ablate, compare_runs
from mohawk.errors import UserError
from mohawk.runs.tables import print_tables
from mohawk.schema.files import shipped


def compared(folder, names, tokens):
    """What is printed for runs of these names and numbers of tokens."""
    recipes = {name: SimpleNamespace(output=folder / str(i)) for i, name in enumerate(names)}
    for i, count in enumerate(tokens):
        found = {
            "tokens": 4096,
            "student_perplexity": 27512.345,
            "teacher_perplexity": 12.3,
            "perplexity_ratio": 2236.776,
        }
        phase = {"tokens": count, "seconds": 90.0}
        write_json(
            folder / str(i) / RESULTS,
            {
                "evaluation": {"distil": {"held_out": {**found, "kl": 7.1234 + i, "top1_agreement": 0.123}}},
                "phases": {"distil": phase},
                "parameters": {"student": 10},
            },
        )
    printed = io.StringIO()
    compare_runs(recipes, lambda recipe: pytest.fail("is done already"), folder, Console(file=printed, width=80), "t")
    return printed.getvalue().partition("written to")[0]  # a path may be longer


LONG = "temperature=2, divergence=skew_reverse_kl, learning_rate=0.0003, kd_weight=0.25"


@pytest.mark.parametrize("given", [{"over": ["output=a,b"]}, {"over": ["seed=1,2"], "overrides": ["output=a"]}])
def test_a_runs_folder_is_not_to_be_varied(given):
    with pytest.raises(UserError, match="output: each run has a folder of its own under --output"):
        ablate(shipped("distill-distilbert"), **given)


def test_figures_are_whole_and_long_names_wrap_at_80_columns(tmp_path):
    printed = compared(tmp_path, ["a", LONG], [1_234_567, 1_234_567])
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    for figure in ("27512.35", "2236.776", "7.1234", "8.1234", "12.3%"):
        assert figure in printed
    assert all(part in printed for part in LONG.split())
    assert printed.count("1,234,567") == 1 and printed.index("1,234,567") < printed.index("perplexity")
    assert "minutes" not in printed
    assert [row["tokens"] for row in read_json(Path(tmp_path) / "ablation.json")["rows"]] == [1_234_567] * 2
    assert "| 1,234,567 | 1.5 |" in (tmp_path / "ablation.md").read_text()


def test_tokens_that_differ_are_not_said_to_be_equal(tmp_path):
    assert "each trained on" not in compared(tmp_path, ["a", "b"], [100, 200])


def test_a_table_that_fits_has_its_headers_on_one_line():
    printed = io.StringIO()
    print_tables([("t", ["name", "same top token"], [["a", "12.3%"]])], Console(file=printed, width=80))
    assert "same top token" in printed.getvalue()
