"""Every command with a fault in one of its file calls, or too little memory for one of its tensors.

It ends with one line and exit code 2, and the same command then ends as if nothing had been. `MOHAWK_FAULTS=all` puts a
fault at every file call, and at hundreds of tensors, not at a few.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from mohawk.errors import ADVICE
from tests.helpers.faults import command, contents
from tests.helpers.forks import listener
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.mohawk.conftest import BEFORE_TRANSFORMERS

pytestmark = pytest.mark.usefixtures("cheap_training")

PHASE = "{tokens: 128, batch_size: 2, sequence_length: 32, save_every: 1, gradient_accumulation: 1}"
COMMON = """
teacher: {work}/teacher
data: {{train: [{work}/text.txt], validation_share: 0.1, cache: {work}/cache}}
evaluation: {{tokens: 64, sequence_length: 32, longest: 64, contexts: [4], decode_tokens: 1, continuation_tokens: 1}}
device: cpu
"""
RECIPES = {
    "convert": f"student: {{ssm_layers: all}}\nphases: {{mixing: {PHASE}, hidden: {PHASE}, end_to_end: {PHASE}}}",
    "distill": f"student: {{layers: [0]}}\nstages: [{PHASE}]",
    "prune": f"prune: {{ffn: 32}}\nheal: {PHASE}\ncalibration: {{tokens: 64, sequence_length: 32}}",
}
COMMANDS = {
    "convert": "convert {work}/convert.yaml",
    "distill": "distill {work}/distill.yaml",
    "prune": "prune {work}/prune.yaml",
    "cache": "cache {work}/convert.yaml --output {work}/answers --tokens 128 --kind hidden",
    "generate-data": "generate-data {work}/prompts.txt --model {work}/teacher --output {work}/answers "
    "--max-new-tokens 2",
    "purify": "purify {work}/a.jsonl {work}/b.jsonl --by vote --output {work}/pure.jsonl",
    "merge": "purify {work}/a.jsonl {work}/b.jsonl --by merge --model {work}/teacher --max-new-tokens 2 "
    "--output {work}/pure.jsonl",
    "select": "select {work}/run-convert --tokens 64",
    "compose": "compose {work}/run-convert --attention 0 --output {work}/composed",
    "evaluate": "evaluate {work}/run-convert",
    "export": "export {work}/run-convert --to hybrid",
    "inspect": "inspect {work}/run-convert --matrices {work}/text.txt --tokens 16 --layers 0",
}
OF_A_RUN = ("select", "compose", "evaluate", "export", "inspect")  # what a conversion has to come before
SLOW = [pytest.param("export", marks=pytest.mark.slow)]  # tried in a process of its own, each time
OF_TENSORS = [*(name for name in COMMANDS if name not in ("purify", "export")), *SLOW]
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EROFS)


class Place:
    """A folder that is always made anew under the same name, since runs write their paths down."""

    def __init__(self, folder):
        self.given, self.work, self.made = folder / "given", folder / "work", {}

    def fresh(self, name):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.given, self.work)
        if name in OF_A_RUN:
            self.undisturbed("convert")
            shutil.rmtree(self.work)
            shutil.copytree(self.given.with_name("convert"), self.work)

    def run(self, name, **fault):
        return command(COMMANDS[name].format(work=self.work).split(), self.work, **fault)

    def undisturbed(self, name):
        """(contents, what it did) of the command with nothing in its way."""
        if name not in self.made:
            self.fresh(name)
            code, said, seen = self.run(name)
            assert code == 0, said
            if name == "convert":
                shutil.copytree(self.work, self.given.with_name("convert"))
            self.made[name] = contents(self.work), seen
        return self.made[name]


@pytest.fixture(scope="module")
def place(tokenizer, make_llama, tmp_path_factory):
    for module in (
        "matplotlib.pyplot",
        "datasets",
        "mohawk.pruning.run",
        "mohawk.conversion.run",
        "mohawk.generation.generate_data",
    ):
        pytest.importorskip(module)  # once here, not in every child
    listener(BEFORE_TRANSFORMERS)
    place = Place(tmp_path_factory.mktemp("faults"))
    given = place.given
    given.mkdir()
    make_llama().save_pretrained(given / "teacher")
    tokenizer.save_pretrained(given / "teacher")
    (given / "text.txt").write_text(" ".join(f"word{i} likes {i * 7 % 13} apples." for i in range(300)))
    for name, own in RECIPES.items():
        common = COMMON.format(work=place.work)
        (given / f"{name}.yaml").write_text(f"{common}output: {place.work}/run-{name}\n{own}\n")
    (given / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(4)))
    for teacher in "ab":
        lines = ({"prompt": f"q{i}", "label": str(i % 2), "rationale": f"{i}", "teacher": teacher} for i in range(3))
        (given / f"{teacher}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def check_line(code, said, work, reason):
    """What a command says of a fault: one line with the path, the reason, and what to do about it."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, f"exit {code}\n{said}"
    assert reason is None or (str(work) in errors[0] and reason in errors[0]), errors[0]


def spread(count, name, most=None):
    """A few of `count` moments, others for each command; if asked for all, all or `most`."""
    if os.environ.get("MOHAWK_FAULTS") == "all":
        return range(1, count + 1, max(1, count // (most or count)))
    first = 1 + sum(map(ord, name)) % max(1, count // 3)
    return range(first, count + 1, max(1, count // 2))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_call_that_fails(place, name):
    """Each fault comes in what the one before left behind; in the end all is as if there had been none."""
    expected, done = place.undisturbed(name)
    place.fresh(name)
    seen, moments = 0, list(spread(len(done.calls), name))
    # how many calls there are differs by a few from time to time: where all of these were harmless, others are tried
    for i, at in enumerate([*moments, *range(1, len(done.calls) + 1, 5)]):
        if i >= len(moments) and seen:
            break
        number = ERRORS[i % len(ERRORS)]
        code, said, _ = place.run(name, at=at, number=number)
        # some calls may fail without harm: a folder that is there already, a file that a library can do without
        if code == 0:
            for left in re.findall(r"could not delete (\S+): ", said):  # and that is all that is left of it
                shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink(missing_ok=True)
            assert contents(place.work) == expected, said
            place.fresh(name)
            continue
        seen += 1
        # what opens no shard or checkpoint words it in its own way; all name the place and the reason
        check_line(code, said, place.work, None)
        assert str(place.work) in said.splitlines()[-1], said
        assert number in ADVICE
    code, said, _ = place.run(name)
    assert code == 0, said
    assert contents(place.work) == expected and seen


@pytest.mark.parametrize(("name", "largest"), [("distill", 3000), ("cache", 20), ("generate-data", 100)])
def test_files_that_may_not_grow(place, name, largest):
    """The kernel refuses what is written beyond so many bytes: to Python, safetensors, torch, Arrow and numpy alike."""
    expected, _ = place.undisturbed(name)
    place.fresh(name)
    code, said, _ = place.run(name, largest=largest)
    check_line(code, said, place.work, "")  # whichever library wrote, the line says where
    code, said, _ = place.run(name)
    assert code == 0 and contents(place.work) == expected, said


@pytest.mark.parametrize("name", ["cache", "generate-data", "merge"])
def test_too_little_memory_in_a_library(place, name):
    """At a few of the calls of numpy, safetensors, tokenizers, pyarrow, datasets, transformers and matplotlib."""
    expected, _ = place.undisturbed(name)
    place.fresh(name)
    code, said, done = place.run(name, library_at=0)
    assert code == 0, said
    place.fresh(name)
    for at in spread(done.libraries, name, 200):
        code, said, _ = place.run(name, library_at=at)
        if code == 0:  # there was less left to do, or the library can do without
            assert contents(place.work) == expected, said
            place.fresh(name)
            continue
        check_line(code, said, place.work, None)
        assert "error: out of memory; lower batch sizes" in said, said
    code, said, _ = place.run(name)
    assert code == 0 and contents(place.work) == expected, said


@pytest.mark.parametrize("name", OF_TENSORS)
def test_too_little_memory(place, name):
    """At a few of the tensors that a command makes, in forward and backward passes, loading, measuring and drawing."""
    expected, done = place.undisturbed(name)
    place.fresh(name)
    for at in spread(done.allocations, name, 200):
        code, said, seen = place.run(name, memory_at=at)
        if code == 0:  # there was less left to do
            assert seen.allocations < at and contents(place.work) == expected, said
            place.fresh(name)
            continue
        check_line(code, said, place.work, None)
        assert "error: out of memory" in said and "; lower batch sizes" in said, said
    code, said, _ = place.run(name)
    assert code == 0 and contents(place.work) == expected, said
