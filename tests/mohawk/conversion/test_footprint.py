"""The plan's memory beside what benchmarks/models/sharding.py measured, and plans for hardware that is not there."""

import json
from pathlib import Path

import pytest

from benchmarks.models import sharding
from mohawk.cli import main
from mohawk.conversion.footprint import Hardware, Strategy, strategies
from mohawk.conversion.recipe import Recipe
from tests.models.conftest import tiny_teacher

MEASURED = json.loads((Path(sharding.RESULTS) / "sharding-cpu.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['phase']} {row['how']} {row['processes']}")
def test_it_is_within_a_seventh_of_what_was_measured(row):
    if row["how"] == "accelerate":
        pytest.skip("no plan of ours")
    planned = sharding.planned(
        row["phase"], row["how"], row["processes"], sharding.ROWS, quick=False, recompute=row["recompute"]
    )
    assert planned == pytest.approx(row["peak_mib"], rel=0.15)


def recipe(**given) -> Recipe:
    return Recipe.from_dict({"teacher": "some/model", "data": {"train": ["text"]}, "device": "cpu", **given})


def test_the_ways_that_a_recipe_allows():
    many = Hardware(8, 2**30)
    assert strategies(recipe(), Hardware(1, 2**30)) == [Strategy(1), Strategy(1, True)]
    assert strategies(recipe(), many) == [Strategy(1), Strategy(1, True), Strategy(8), Strategy(8, True)]
    full = {"kind": "full", "within": 4}
    assert strategies(recipe(sharding=full, activation_checkpointing=False), many) == [Strategy(4)]
    assert strategies(recipe(sharding={"kind": "none"}), many) == [Strategy(1), Strategy(1, True)]


@pytest.fixture
def planned(tokenizer, tmp_path, capsys):
    """What a dry run prints for so much hardware, and its exit code."""
    tiny_teacher(vocab_size=258, num_hidden_layers=2, bos_token_id=256, eos_token_id=257).save_pretrained(
        tmp_path / "t"
    )
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "a.txt").write_text("some words\n" * 40)
    recipe(teacher=str(tmp_path / "t"), data={"train": [str(tmp_path / "a.txt")]}).save(tmp_path / "recipe.yaml")

    def run(*options: str) -> tuple[int, str]:
        code = main(["convert", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), *options])
        caught = capsys.readouterr()
        return code, " ".join((caught.out + caught.err).split())

    return run


def test_a_plan_for_other_hardware(planned):
    code, said = planned("--dry-run", "--processes", "8", "--device-memory", "24GiB", "--utilisation", "0.5")
    assert code == 0 and "At 50% of 989 TFLOP/s on 8 devices" in said and "tokens a second" in said
    code, said = planned("--dry-run", "--processes", "8", "--device-memory", "1MB")
    assert code == 0 and "in 8 parts" in said and "More than the 0.0 GiB of a device" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--processes", "8"), "--processes is of --dry-run"),
        (
            ("--dry-run", "--processes", "7", "--set", "sharding.within=2"),
            "sharding.within: got 2, which does not divide",
        ),
        (("--dry-run", "--processes", "7"), "16 rows cannot be dealt evenly to 7 processes"),
    ],
)
def test_what_does_not_go_together(planned, options, said):
    assert said in planned(*options)[1]


@pytest.mark.parametrize("size", ["80", "0GB", "0.0000001MB", 400 * "9" + "GB"])
def test_memory_has_a_unit_and_a_size(size, planned, capsys):
    with pytest.raises(SystemExit):
        planned("--dry-run", "--device-memory", size)
    said = capsys.readouterr().err
    assert f"got '{size[:9]}" in said and "allowed: a number with MB, GB, MiB or GiB, such as 80GB" in said
