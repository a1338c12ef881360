"""Writing a cache: killed at any moment, two at once, onto a full disk, over damage; and the command that does it."""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from mohawk.cli import main
from mohawk.core.folders import MANIFEST, locked, why_incomplete
from mohawk.data.packing import PackedDataset
from mohawk.errors import UserError
from mohawk.loading.model_hash import teacher_hash
from mohawk.teacher_cache.reader import TeacherCache, shard_name
from mohawk.teacher_cache.writer import write_cache
from tests.helpers.tiny_phase import cheap_training, fork, wait  # noqa: F401
from tests.helpers.tiny_teacher import LENGTH, VOCAB, documents

pytestmark = pytest.mark.usefixtures("cheap_training")

SETTINGS = {"kind": "top-k", "k": 3, "rows_per_shard": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PackedDataset(documents(tmp_path_factory.mktemp("text")), LENGTH, seed=3)


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(1)


def content(folder: Path) -> dict[str, str]:
    """sha256 of all files but the lock."""
    files = sorted(path for path in folder.iterdir() if path.name != ".lock")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher, dataset):
    """A cache that nothing interrupted: the folder and its content."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    write_cache(folder, teacher, dataset, **SETTINGS)
    assert content(folder).keys() == {MANIFEST, "settings.json", *(shard_name(i) for i in range(4))}
    return folder, content(folder)


class Counting:
    """A dataset that tells which rows the teacher was run on."""

    def __init__(self, dataset):
        self.dataset, self.seed, self.read = dataset, dataset.seed, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.read.append(index)
        return self.dataset[index]


@pytest.mark.parametrize("kind", ["top-k", "hidden"])
def test_killed_whenever_it_touches_a_file_it_ends_as_if_it_had_not_been(tmp_path, teacher, dataset, kind):
    settings = SETTINGS | {"kind": kind, "rows_per_shard": 6}
    write_cache(tmp_path / "expected" / "cache", teacher, dataset, **settings)
    expected = content(tmp_path / "expected" / "cache")

    def start(folder, die_at):
        seen = []

        def watch(event, args):
            if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(folder) in str(args[0]):
                seen.append(event)
                if len(seen) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def body():
            sys.addaudithook(watch)
            write_cache(folder, teacher, dataset, **settings)

        return fork(body)

    kept = 0
    for die_at in range(1, 500):
        folder = tmp_path / str(die_at) / "cache"
        code = wait(start(folder, die_at))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if folder.exists():  # whole or absent
            assert why_incomplete(folder) is None
        before = {path: path.stat().st_mtime_ns for path in folder.parent.glob("cache.unfinished/shard-*.bin")}
        write_cache(folder, teacher, dataset, **settings)
        assert content(folder) == expected
        assert [path.name for path in folder.parent.iterdir()] == ["cache"]
        for path, written in before.items():
            kept += 1
            assert (folder / path.name).stat().st_mtime_ns == written
    assert code == 0 and die_at > 20 and kept > 10


def test_a_finished_cache_is_only_checked(whole, dataset, teacher, caplog):
    folder, expected = whole
    with caplog.at_level(logging.INFO):
        cache = write_cache(folder, teacher, dataset, **SETTINGS | {"batch_size": 5})
    assert "is there already" in caplog.text and len(cache) == 14
    assert content(folder) == expected


@pytest.mark.parametrize("damaged", [shard_name(1), shard_name(3), MANIFEST, "settings.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_written_again_and_the_rest_kept(tmp_path, whole, teacher, dataset, damaged, how):
    folder, expected = tmp_path / "cache", whole[1]
    shutil.copytree(whole[0], folder)
    path = folder / damaged
    raw = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 2
        path.write_bytes(raw if how == "flipped" else raw[: len(raw) // 2])
    written = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*") if p.name != damaged}
    write_cache(folder, teacher, dataset, **SETTINGS)
    assert content(folder) == expected and TeacherCache(folder).damage() is None
    assert all((folder / name).stat().st_mtime_ns == at for name, at in written.items())


@pytest.mark.parametrize("changed", ["temperature", "rows", "sha256 of a shard", "format", "files"])
def test_a_damaged_manifest_that_is_still_json_is_repaired_as_the_reader_advises(
    tmp_path, whole, teacher, dataset, changed
):
    folder, expected = tmp_path / "cache", whole[1]
    shutil.copytree(whole[0], folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    shard = manifest["files"][shard_name(1)]["sha256"]
    old, new = {
        "temperature": ('"temperature": 1.0', '"temperature": 1.1'),
        "rows": ('"rows": 14', '"rows": 15'),
        "sha256 of a shard": (shard, ("0" if shard[0] != "0" else "1") + shard[1:]),
        "format": ("teacher cache", "teacher cachf"),
        "files": ('"files"', '"filez"'),
    }[changed]
    text = (folder / MANIFEST).read_text()
    assert text.count(old) == 1
    (folder / MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(UserError):
        TeacherCache(folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    write_cache(folder, teacher, dataset, **SETTINGS)
    assert content(folder) == expected and TeacherCache(folder).damage() is None
    again = {name for name, at in written.items() if (folder / name).stat().st_mtime_ns != at}
    assert again == ({shard_name(1)} if changed == "sha256 of a shard" else set())


@pytest.mark.parametrize("manifest", ["whole", "damaged"])
def test_a_shard_of_another_cache_is_written_again(tmp_path, whole, teacher, dataset, manifest):
    folder, expected = tmp_path / "cache", whole[1]
    shutil.copytree(whole[0], folder)
    hot = write_cache(tmp_path / "hot", teacher, dataset, **SETTINGS | {"temperature": 2.0})
    shutil.copy(hot.folder / shard_name(2), folder / shard_name(2))
    if manifest == "damaged":
        path = folder / MANIFEST
        path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 1.1'))
    write_cache(folder, teacher, dataset, **SETTINGS)
    assert content(folder) == expected


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_of_something_else_is_not_gone_on_with(tmp_path, whole, teacher, dataset, make_llama, finished):
    folder = tmp_path / "cache"
    there = folder if finished else tmp_path / "cache.unfinished"
    shutil.copytree(whole[0], there)
    if not finished:
        (there / MANIFEST).unlink()
        (there / shard_name(3)).unlink()
    before = content(there)

    def refused(*words, teacher=teacher, dataset=dataset, **changed):
        with pytest.raises(UserError) as error:
            write_cache(folder, teacher, dataset, **{**SETTINGS, **changed})
        one_line(error, str(there), *words)
        assert content(there) == before

    refused("layout.k 3 (now 4)", k=4)
    refused("temperature 1.0 (now 2.0)", temperature=2.0)
    refused("tokenizer None (now x)", tokenizer_hash="x")
    refused("data.seed 3 (now 4)", dataset=PackedDataset(dataset.documents, LENGTH, seed=4))
    refused("data.rows 14 (now 5)", rows=5)
    changed = make_llama(1)
    changed.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-3
    refused("teacher.sha256", teacher=changed)
    (tmp_path / "text").mkdir()
    refused("row 0", "another text", dataset=PackedDataset(documents(tmp_path / "text", seed=1), LENGTH, seed=3))


def test_an_output_that_is_no_cache_is_left_alone(tmp_path, teacher, dataset):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError) as error:
        write_cache(folder, teacher, dataset, **SETTINGS)
    one_line(error, str(folder), "not a teacher cache", "another output")
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"] and not (tmp_path / "mine.unfinished").exists()


def test_an_empty_folder_is_no_obstacle(tmp_path, teacher, dataset):
    (tmp_path / "cache").mkdir()
    assert len(write_cache(tmp_path / "cache", teacher, dataset, **SETTINGS)) == 14


def test_without_a_terminal_progress_is_lines_with_an_estimate(tmp_path, teacher, dataset, monkeypatch, capsys, caplog):
    monkeypatch.setattr("mohawk.core.terminal.PLAIN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        write_cache(tmp_path / "cache", teacher, dataset, **SETTINGS)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cache  ")]  # not what was cached
    assert len(lines) == 7 and all(
        re.fullmatch(r"cache  row \d+/14  [\d,]+ tokens/s, \d\d:\d\d left", x) for x in lines
    )
    record = json.loads((tmp_path / "cache" / MANIFEST).read_text())["files"][shard_name(0)]
    size = f"{record['bytes'] / (4 * LENGTH):.1f} bytes a token"
    assert size in caplog.text and "224 tokens (224 in this run)" in caplog.text


def test_one_writer_at_a_time(tmp_path, teacher, dataset):
    unfinished = tmp_path / "cache.unfinished"
    unfinished.mkdir()
    with locked(unfinished), pytest.raises(UserError, match="another process is at work here"):
        write_cache(tmp_path / "cache", teacher, dataset, **SETTINGS)
    write_cache(tmp_path / "cache", teacher, dataset, **SETTINGS)


def test_a_disk_without_room_is_a_line_before_the_teacher_runs(tmp_path, teacher, dataset, monkeypatch):
    counting = Counting(dataset)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError) as error:
        write_cache(tmp_path / "cache", teacher, counting, **SETTINGS)
    one_line(error, "needs 0.0 GB more", "make room")
    assert set(counting.read) == {0}


def test_a_disk_that_fills_up_is_a_line_and_what_is_finished_stays(tmp_path, teacher, dataset, monkeypatch):
    rename = os.rename

    def full(source, target):
        if str(target).endswith(shard_name(2)):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError) as error:
        write_cache(tmp_path / "cache", teacher, dataset, **SETTINGS)
    one_line(error, "No space left on device", "finished shards are kept")
    monkeypatch.undo()
    calls = []
    hook = teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    write_cache(tmp_path / "cache", teacher, dataset, **SETTINGS)
    hook.remove()
    assert len(calls) == 2 + 1  # rows 8 to 13, two at a time


def test_a_teacher_that_gives_nan_is_refused(tmp_path, make_llama, dataset):
    broken = make_llama(1)
    broken.model.norm.weight.data[3] = torch.nan
    for kind in ("top-k", "samples", "hidden"):
        with pytest.raises(UserError) as error:
            write_cache(tmp_path / kind, broken, dataset, kind=kind)
        one_line(error, "NaN", "row 0", "float16")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "logits"}, ["kind", "top-k, samples, hidden"]),
        ({"k": 0}, ["k: got 0", "1 to 258"]),
        ({"k": VOCAB + 1}, ["k: got 259", "1 to 258"]),
        ({"kind": "samples", "draws": 0}, ["draws"]),
        ({"temperature": 0.0}, ["temperature"]),
        ({"rows": 15}, ["rows: got 15", "1 to 14"]),
        ({"batch_size": 0}, ["batch_size"]),
        ({"vocab_size": 300}, ["vocab_size: got 300", "1 to 258"]),
    ],
)
def test_arguments_out_of_their_range(tmp_path, teacher, dataset, given, words):
    with pytest.raises(UserError) as error:
        write_cache(tmp_path / "cache", teacher, dataset, **given)
    one_line(error, *words)
    assert not list(tmp_path.iterdir())


def test_tokens_that_the_teacher_does_not_have(tmp_path, make_llama, dataset):
    with pytest.raises(UserError) as error:
        write_cache(tmp_path / "cache", make_llama(1, vocab_size=200, bos_token_id=1, eos_token_id=2), dataset, k=2)
    one_line(error, "token 25", "only 200", "tokenizer")


def test_logits_of_a_batch_are_never_all_there(tmp_path, make_llama, dataset, monkeypatch):
    """The largest tensor that is made has as many logits as the tile, not as many as the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    teacher = make_llama(1, vocab_size=5000)
    monkeypatch.setattr("mohawk.teacher_cache.answers.TILE_BYTES", 4 * 5000 * 6)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (5000,) and out.is_contiguous():
                largest = max(largest, out.numel() // 5000)  # not the head, transposed
            return out

    for kind in ("top-k", "samples"):
        with Watch():
            write_cache(tmp_path / kind, teacher, dataset, kind=kind, batch_size=14)
    assert largest == 14  # the last position of each of the 14 rows checks the head


def test_the_teacher_is_run_without_dropout_and_left_as_it_was(tmp_path, make_llama, dataset):
    teacher = make_llama(1, attention_dropout=0.5)
    expected = write_cache(tmp_path / "a", teacher, dataset, **SETTINGS)
    teacher.train()
    found = write_cache(tmp_path / "b", teacher, dataset, **SETTINGS)
    assert teacher.training and all(
        torch.equal(expected.row(i)["teacher_logprobs"], found.row(i)["teacher_logprobs"]) for i in range(14)
    )


def test_a_teachers_hash_is_of_its_weights_and_not_of_its_place(make_llama):
    one, other = make_llama(1), make_llama(1)
    other.config._name_or_path = "/somewhere/else"
    assert teacher_hash(one) == teacher_hash(other) != teacher_hash(make_llama(2))
    other.lm_head.weight.data[7, 7] += 1e-4
    assert teacher_hash(one) != teacher_hash(other)


def test_a_teacher_that_lies_on_the_disk(tmp_path, make_llama, dataset):
    from transformers import AutoModelForCausalLM

    teacher = make_llama(1, tie_word_embeddings=False)
    teacher.save_pretrained(tmp_path / "teacher")
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {part: "cpu" if part == "model.layers.0" else "disk" for part in parts}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert {p.device.type for p in offloaded.parameters()} == {"cpu", "meta"}
    assert teacher_hash(offloaded) == teacher_hash(teacher)
    for kind in ("top-k", "hidden"):
        write_cache(tmp_path / f"a-{kind}", teacher, dataset, kind=kind, k=5)
        write_cache(tmp_path / f"b-{kind}", offloaded, dataset, kind=kind, k=5)
        names = [name for name in content(tmp_path / f"a-{kind}") if name.endswith(".bin")]
        for name in names:
            assert (tmp_path / f"a-{kind}" / name).read_bytes() == (tmp_path / f"b-{kind}" / name).read_bytes()


@pytest.fixture
def recipe(tmp_path, make_llama, tokenizer):
    """A recipe on disk with a tiny teacher and two documents."""
    folder = tmp_path / "teacher"
    make_llama(1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} of all things is water. " * 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"teacher: {{model: {folder}}}\ndata: {{train: [{{source: {tmp_path}/*.txt}}], cache: {tmp_path}/tokens}}\n"
        "phases: {mixing: null, hidden: null, end_to_end: "
        "{tokens: 1024, batch_size: 4, sequence_length: 32, gradient_accumulation: 1, temperature: 2.0}}\n"
        "precision: float32\nseed: 5\n"
    )
    return path


def test_the_command_caches_what_phase_3_of_a_recipe_trains_on(tmp_path, recipe, tokenizer, capfd):
    from mohawk.data.packing import load_data
    from mohawk.data.text import tokenizer_key
    from mohawk.teacher_cache.reader import CachedRows

    assert main(["cache", str(recipe), "--output", str(tmp_path / "c"), "--k", "9"]) == 0
    err = capfd.readouterr().err
    assert "cached" in err and "bytes a token" in err and "tokens/s" in err
    cache = TeacherCache(tmp_path / "c")
    data = load_data([{"source": f"{tmp_path}/*.txt"}], tokenizer, cache=tmp_path / "tokens")
    rows = CachedRows(PackedDataset(data.train, 32, seed=5), cache)
    assert len(rows) == len(rows.dataset) and cache.layout.k == 9
    cache.check(temperature=2.0, seed=5, tokenizer_hash=tokenizer_key(tokenizer))

    given = ["--kind", "samples", "--draws", "4", "--temperature", "1", "--sequence-length", "16", "--tokens", "100"]
    assert main(["cache", str(recipe), "--output", str(tmp_path / "d"), *given, "--set", "seed=6"]) == 0
    cache = TeacherCache(tmp_path / "d")
    assert (len(cache), cache.temperature, cache.manifest["data"]["seed"], cache.layout.k) == (7, 1.0, 6, 4)

    assert main(["cache", str(recipe), "--output", str(tmp_path / "c"), "--k", "8"]) == 2
    assert "layout.k 9 (now 8)" in capfd.readouterr().err


def run(recipe, *settings) -> list[float]:
    """The loss of every step of a distillation."""
    output = recipe.parent / f"run{len(list(recipe.parent.iterdir()))}"
    assert main(["distill", str(recipe), "--output", str(output), *(f"--set={one}" for one in settings)]) == 0
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_distillation_from_a_cache_is_the_online_one(tmp_path, recipe, capfd):
    staged = tmp_path / "staged.yaml"
    text, _ = recipe.read_text().split("phases:")
    staged.write_text(
        text + "student: {layers: [0]}\nprecision: float32\nseed: 5\n"
        "evaluation: {sequence_length: 32, tokens: 64, "
        "longest: 64, contexts: [8], decode_tokens: 1, continuation_tokens: 1}\n"
        "stages:\n"
        "  - {name: own, learn_from: start, tokens: 96, batch_size: 3, sequence_length: 32, gradient_accumulation: 1}\n"
        "  - {name: far, tokens: 640, batch_size: 4, sequence_length: 32, gradient_accumulation: 1, temperature: 2.0}\n"
    )
    assert main(["cache", str(staged), "--output", str(tmp_path / "hidden"), "--kind", "hidden"]) == 0
    assert main(["cache", str(staged), "--output", str(tmp_path / "top"), "--k", "258", "--stage", "far"]) == 0
    assert TeacherCache(tmp_path / "top").temperature == 2.0
    online = run(staged)
    assert run(staged, f"stages.1.cache={tmp_path / 'hidden'}") == online
    assert run(staged, f"stages.1.cache={tmp_path / 'top'}") == pytest.approx(online, abs=2e-4)
    capfd.readouterr()
    for settings, words in (
        ([f"stages.1.cache={tmp_path / 'top'}", "stages.1.temperature=3.0"], "temperature 2, here it is 3"),
        ([f"stages.1.cache={tmp_path / 'hidden'}", "seed=6"], "data seed 5, here it is 6"),
    ):
        line = ["distill", str(staged), "--output", str(tmp_path / "x"), *(f"--set={one}" for one in settings)]
        assert main(line) == 2
        assert words in capfd.readouterr().err
        shutil.rmtree(tmp_path / "x", ignore_errors=True)  # a temperature is compared before there is a run


def test_a_student_of_a_smaller_vocabulary_learns_from_a_cache_what_it_would_online(tmp_path, make_llama, recipe):
    """Rows that fill up the teacher's embedding are none of the student's, as in checkpoints of one family."""
    make_llama(1, vocab_size=300).save_pretrained(tmp_path / "teacher")
    make_llama(2).save_pretrained(tmp_path / "small")
    staged = tmp_path / "staged.yaml"
    text, _ = recipe.read_text().split("phases:")
    staged.write_text(
        text + f"student: {tmp_path / 'small'}\nprecision: float32\nseed: 5\n"
        "evaluation: {sequence_length: 32, tokens: 64, "
        "longest: 64, contexts: [8], decode_tokens: 1, continuation_tokens: 1}\n"
        "stages: [{tokens: 640, batch_size: 4, sequence_length: 32, gradient_accumulation: 1}]\n"
    )
    assert main(["cache", str(staged), "--output", str(tmp_path / "hidden"), "--kind", "hidden"]) == 0
    assert main(["cache", str(staged), "--output", str(tmp_path / "top"), "--k", "300"]) == 0
    online = run(staged)
    assert run(staged, f"stages.0.cache={tmp_path / 'hidden'}") == online
    assert run(staged, f"stages.0.cache={tmp_path / 'top'}") == pytest.approx(online, abs=2e-4)


def test_which_stage_a_cache_is_for(tmp_path, recipe, capfd):
    text, _ = recipe.read_text().split("phases:")
    stage = "{tokens: 1024, batch_size: 4, sequence_length: 32, gradient_accumulation: 1, "
    staged = tmp_path / "staged.yaml"
    staged.write_text(
        text + "student: {layers: [0]}\nstages:\n"
        f"  - {stage} name: own, learn_from: start}}\n  - {stage} name: far, temperature: {{start: 5, end: 1}}}}\n"
    )

    def refused(*given) -> str:
        assert main(["cache", str(staged), "--output", str(tmp_path / "c"), *given]) == 2
        return capfd.readouterr().err

    assert "got --stage own; allowed: far" in refused("--stage", "own")
    assert "give --temperature T" in refused()
    assert "stages: " in refused("--set", "stages.1.learn_from=previous")
    assert "one teacher's answers" in refused("--set", f"teachers=[{{model: {tmp_path / 'teacher'}}}]")
    staged = recipe
    assert "--stage far: a conversion" in refused("--stage", "far")
    assert "phases.end_to_end" in refused(
        "--set", "phases.end_to_end=null", "--set", "phases.hidden={tokens: 512, batch_size: 1, sequence_length: 32}"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--kind", "samples", "--k", "5"], "--k is of --kind top-k, not of samples"),
        (["--draws", "5"], "--draws is of --kind samples, not of top-k"),
        (["--kind", "hidden", "--temperature", "2"], "hidden states serve any"),
    ],
)
def test_options_of_another_kind_are_refused(recipe, given, words, capsys):
    assert main(["cache", str(recipe), "--output", "x", *given]) == 2
    assert words in capsys.readouterr().err


def test_the_manifest_of_a_finished_cache_is_json_that_others_can_read(whole):
    about = json.loads((whole[0] / MANIFEST).read_text())
    assert about["files"].keys() == content(whole[0]).keys() - {MANIFEST}
