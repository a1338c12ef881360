"""Tokenizers are told apart by what their ids mean, before any weights are loaded, whatever the sizes."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohawk.cli import main
from mohawk.data.tokenizers.same_tokenizer import check_embedding_rows, check_same, own_tokenizer, teacher_tokenizer
from mohawk.errors import UserError
from mohawk.teacher_cache.writer import write_cache

MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "the"), ("t", "he"), ("h", "e")]


def made(merges=MERGES, first="", normalizer=None, extra=(), **special):
    """A byte-level BPE tokenizer; `first`: a token that comes before all others and moves their ids by one."""
    vocab = {token: i for i, token in enumerate([*first.split(), *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for pair in [*merges, *extra]:
        vocab.setdefault("".join(pair), len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<eos>", "bos_token": "<bos>", **special})


@pytest.fixture(scope="module")
def teacher():
    return made()


def refusal(teacher, other, **options) -> str | None:
    try:
        check_same(teacher, other, "student.model: x", **options)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("student.model: x: its tokenizer is another one than")
        return str(error)
    return None


def test_the_same_tokenizer_passes_whatever_else_differs(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    assert refusal(teacher, AutoTokenizer.from_pretrained(tmp_path)) is None
    longer = copy.deepcopy(teacher)
    longer.add_tokens(["<extra>", "<more>"])  # ids that only one of them has
    assert refusal(teacher, longer) is None and refusal(longer, teacher) is None
    padded = copy.deepcopy(teacher)
    padded.pad_token = "<eos>"  # which the teacher has not
    assert refusal(teacher, padded) is None and refusal(padded, teacher) is None


def test_the_first_id_that_is_another_token_is_named(teacher):
    """Also of a tokenizer with more of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    said = refusal(teacher, made(first="new"))
    assert f"id 0 is {alphabet[0]!r} there and 'new' here" in said
    swapped = made(merges=[MERGES[0], MERGES[1], MERGES[3], MERGES[2], *MERGES[4:]], extra=[("z", "z")])
    assert len(swapped) > len(teacher)
    said = refusal(teacher, swapped)
    assert "id 258 is 'in' there and 'an' here" in said and "a model of the same tokenizer" in said
    special = made()
    added = {"<a>": 1, "<b>": 2}
    one, other = copy.deepcopy(special), copy.deepcopy(special)
    one.add_tokens(list(added)), other.add_tokens(list(added)[::-1])
    assert f"id {len(special)} is '<a>' there and '<b>' here" in refusal(one, other)


@pytest.mark.parametrize("how", ["merges", "normaliser", "pre-tokenizer"])
def test_tokens_alike_and_text_cut_otherwise(teacher, how):
    if how == "merges":  # one is missing, so its token stays and is never made
        state = json.loads(teacher.backend_tokenizer.to_str())
        state["model"]["merges"].remove(["an", "d"])
        other = copy.deepcopy(teacher)
        other._tokenizer = Tokenizer.from_str(json.dumps(state))
        assert other.get_vocab() == teacher.get_vocab() and other("and").input_ids != teacher("and").input_ids
    elif how == "normaliser":
        other = made(normalizer=normalizers.NFKC())
    else:
        other = made()
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    said = refusal(teacher, other)
    assert "all tokens are alike, but " in said and " is cut into " in said


@pytest.mark.parametrize("how", ["order of merges", "whole words", "digits", "lines", "quotes"])
def test_tokens_alike_by_themselves_and_cut_otherwise_beside_others(how):
    """Each token's own text is cut alike, and none of these letters stand together in any sample."""
    letters = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def made_of(merges, pattern=None, normalizer=None, **options):
        vocab = letters | {token: 256 + i for i, token in enumerate(["zq", "qx", "zqx", "Ċ/", "123"])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[*merges, ("Ċ", "/")], **options))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        if pattern is not None:
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
        if normalizer is not None:
            backend.normalizer = normalizer
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")

    two, three = [("z", "q"), ("q", "x")], [("z", "q"), ("q", "x"), ("zq", "x")]
    words = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    whole = {"ignore_merges": True}
    one, other, text = {
        "order of merges": (made_of(two), made_of(two[::-1]), "zqx"),
        "whole words": (made_of(three), made_of(two, **whole), "azqx"),
        "digits": (made_of([], words, **whole), made_of([], words.replace("{1,3}", "+"), **whole), "1234"),
        "lines": (made_of([], words), made_of([], words.replace(r"[\r\n]*", r"[\r\n/]*")), "a.\n/b"),
        "quotes": (made_of([]), made_of([], normalizer=normalizers.Replace("``", '"')), "``a''"),
    }[how]
    assert one.get_vocab() == other.get_vocab() and one(text).input_ids != other(text).input_ids
    assert "all tokens are alike, but " in refusal(one, other)
    assert refusal(one, copy.deepcopy(one)) is None


def test_scores_of_pieces_are_compared():
    def pieces(first, second):
        vocab = [("<unk>", 0.0), *((letter, -8.0) for letter in "▁azqx"), ("zq", first), ("qx", second)]
        backend = Tokenizer(models.Unigram(vocab, unk_id=0))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")

    one, other = pieces(-9.0, -10.0), pieces(-10.0, -9.0)
    assert one("azqx").input_ids != other("azqx").input_ids
    assert "'zq' has the score -9 there and -10 here" in refusal(one, other)
    assert refusal(one, pieces(-9.0, -10.0)) is None and refusal(one, pieces(-9.0, -10.00001)) is None


def test_merges_in_another_order_that_cut_alike_are_the_same():
    """As conversions of one model may list them: only what two merges contend for tells their order."""
    merges = [("z", "q"), ("a", "b"), ("zq", "x")]
    assert refusal(made(merges), made(merges)) is None
    state = json.loads(made(merges).backend_tokenizer.to_str())
    state["model"]["merges"] = [list(merges[i]) for i in (1, 0, 2)]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>", bos_token="<bos>"
    )
    assert refusal(made(merges), other) is None


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("special", [True, False])
def test_how_an_added_token_is_looked_for(flag, special):
    """Each flag changes how some text around the token is cut."""

    def with_token(on: bool, normalizer=None):
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {flag: on}
        found = made(normalizer=normalizer)
        found.add_tokens([AddedToken("<Call>", special=special, **flags)], special_tokens=special)
        return found

    lower = normalizers.Lowercase() if flag == "normalized" else None
    one, other = with_token(False, lower), with_token(True, lower)
    assert refusal(one, with_token(False, lower)) is None
    text = "the <call>and <Call> in an<Call>d"
    assert one(text).input_ids != other(text).input_ids
    said = refusal(one, other)
    assert f"id {one.convert_tokens_to_ids('<Call>')}, '<Call>', has {flag} False there and True here" in said
    if flag == "normalized":  # without a normaliser it is one and the same
        assert refusal(with_token(False), with_token(True)) is None


def test_one_merge_of_a_large_vocabulary():
    """Whichever it is: every token that both have is cut."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [(a, b) for a in letters for b in letters]
    longer = [(a + b, c) for a, b in words for c in letters]
    state = json.loads(made(merges=[*words, *longer]).backend_tokenizer.to_str())
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>")
    for merge in longer[1234:1239]:
        less = copy.deepcopy(state)
        less["model"]["merges"].remove(list(merge))
        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(less)), eos_token="<eos>")
        assert f"all tokens are alike, but {''.join(merge)!r} is cut" in refusal(teacher, other)


def test_roles_are_compared_unless_told_otherwise(teacher):
    for role, own, named in (("eos", "<eos>", "<bos>"), ("bos", "<bos>", "<eos>")):
        other = copy.deepcopy(teacher)
        setattr(other, f"{role}_token", named)
        there, here = (getattr(t, f"{role}_token_id") for t in (teacher, other))
        said = refusal(teacher, other)
        assert f"{role} is {there} ({own!r}) there and {here} ({named!r}) here" in said and "teacher.tokenizer" in said
        assert refusal(teacher, other, roles=False) is None
    other = copy.deepcopy(teacher)
    other.eos_token = None
    assert "eos is" in refusal(teacher, other) and "none here" in refusal(teacher, other)
    one, other = copy.deepcopy(teacher), copy.deepcopy(teacher)
    one.pad_token, other.pad_token = "<eos>", "<bos>"
    assert "pad is" in refusal(one, other)


def test_a_tokenizer_larger_than_the_embedding(teacher):
    highest = max(teacher.get_vocab().values())
    check_embedding_rows(teacher, highest + 1, "teacher")
    with pytest.raises(UserError, match=rf"teacher: its tokenizer has ids up to {highest} \('<\w+>'\).*only {highest}"):
        check_embedding_rows(teacher, highest, "teacher")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_llama, teacher):
    """Models of one tokenizer, of another that is larger, of one whose embedding is too small, and without one."""
    root = tmp_path_factory.mktemp("models")
    shape = {"bos_token_id": 263, "eos_token_id": 264}
    other = made(first="new", extra=[("z", "z")])
    roles = copy.deepcopy(teacher)
    roles.eos_token = "<bos>"
    for seed, (name, tokenizer, rows) in enumerate(
        [("same", teacher, 270), ("padded", teacher, 300), ("other", other, 270), ("roles", roles, 270),
         ("small", teacher, 260), ("bare", None, 270)]
    ):  # fmt: skip
        make_llama(seed, vocab_size=rows, **({} if rows > 264 else {"bos_token_id": 1, "eos_token_id": 2}) or shape
                   ).save_pretrained(root / name)  # fmt: skip
        if tokenizer is not None:
            tokenizer.save_pretrained(root / name)
        if name not in ("same", "padded", "bare"):
            (root / name / "model.safetensors").unlink()  # it is refused before weights are looked at
    (root / "text.txt").write_text("The name of all things is water. " * 60)
    return root


def recipe(folders, tmp_path, **changes):
    stage = {"tokens": 128, "batch_size": 2, "sequence_length": 32, "learning_rate": 1e-3}
    data = {
        "teacher": str(folders / "same"), "student": {"layers": [0]}, "precision": "float32", "device": "cpu",
        "data": {"train": [str(folders / "text.txt")], "validation_share": 0.1, "cache": str(folders / "cache")},
        "stages": [stage], "output": str(tmp_path / "run"),
        "evaluation": {"sequence_length": 32, "tokens": 64, "longest": 64, "contexts": [8], "decode_tokens": 1,
                       "continuation_tokens": 1},
    } | changes  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


CASES = {
    "student": ({"student": {"model": "other"}}, "student.model: .*other: its tokenizer is another one than the teach"),
    "roles": ({"student": {"model": "roles"}}, "student.model: .*roles: its tokenizer .*: eos is 264 .* and 263"),
    "small": ({"student": {"model": "small"}}, "student.model: .*small: the teacher's tokenizer has ids up to"),
    "its own": ({"teacher": "small"}, "teacher: .*small: its tokenizer has ids up to 264 .*only 260 rows"),
    "ensemble": ({"teachers": ["other"]}, "teachers.0: .*other: its tokenizer is another one than the teacher's"),
    "named": (
        {"teacher": {"model": "same", "tokenizer": "other"}},
        "teacher.tokenizer: .*other: its tokenizer is another one than .*same's own: id 0 is",
    ),
}  # fmt: skip


def there(given, folders):
    """Names of models as their folders."""
    if isinstance(given, dict):
        return {key: there(value, folders) for key, value in given.items()}
    if isinstance(given, list):
        return [there(value, folders) for value in given]
    return str(folders / given) if isinstance(given, str) else given


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["distill --dry-run", "distill", "cache"])
def test_commands_refuse_before_weights(case, command, folders, tmp_path, capsys):
    changes, words = CASES[case]
    if command == "cache" and case == "ensemble":
        words = "teachers: a cache holds one teacher's answers"
    path = recipe(folders, tmp_path, **there(changes, folders))
    name, *options = command.split()
    options += ["--output", str(tmp_path / "cache")] if name == "cache" else []
    assert main([name, path, *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert re.match("error: " + words, error[-1]), error
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_students_own_tokenizer_is_compared_before_it_is_evaluated(folders, tmp_path, capsys):
    """As where another teacher is named than the run's."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(Path(recipe(folders, tmp_path)).read_text())
    shutil.copytree(folders / "other", run / "student")
    assert main(["evaluate", str(run)]) == 2
    assert "student: its tokenizer is another one than the teacher's: id 0 is" in capsys.readouterr().err


def test_padding_rows_and_students_without_a_tokenizer_are_fine(folders, tmp_path, capsys):
    for student in ("padded", "bare"):
        path = recipe(folders, tmp_path, student={"model": str(folders / student)})
        assert main(["distill", path, "--dry-run"]) == 0, capsys.readouterr().err
    path = recipe(folders, tmp_path, student={"model": str(folders / "roles")})
    named = ["--set", f"teacher.tokenizer={folders / 'roles'}"]  # whose eos both then have
    assert main(["distill", path, "--dry-run", *named]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "prune"])
def test_conversions_and_prunings_check_their_teacher(command, folders, tmp_path, capsys):
    own = {"convert": {"student": {"ssm_layers": [1]}}, "prune": {"prune": {"ffn": 24}}}[command]
    for teacher, words in (
        ({"model": "small"}, "its tokenizer has ids up to 264"),
        ({"model": "same", "tokenizer": "other"}, "is another one than"),
    ):
        data = {
            "teacher": there(teacher, folders), "precision": "float32", "output": str(tmp_path / "run"),
            "data": {"train": [str(folders / "text.txt")], "cache": str(folders / "cache")}, **own,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data))
        for options in (["--dry-run"], []):
            assert main([command, str(path), *options]) == 2
            assert words in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["generate", "generate-data"])
def test_a_tokenizer_named_for_a_local_model_is_its_own(command, folders, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    line = {
        "generate": ["generate", str(folders / "same"), "--prompt", "a"],
        "generate-data": ["generate-data", str(tmp_path / "prompts.txt"), "--field", "text", "--model",
                          str(folders / "same"), "--output", str(tmp_path / "answers")],
    }[command]  # fmt: skip
    assert main([*line, "--tokenizer", str(folders / "other")]) == 2
    assert "--tokenizer: " in (error := capsys.readouterr().err) and "id 0 is" in error
    assert main([part if part != str(folders / "same") else str(folders / "small") for part in line]) == 2
    assert "its tokenizer has ids up to 264" in capsys.readouterr().err


def test_a_tokenizer_of_a_bare_model_is_taken(folders):
    found = teacher_tokenizer(folders / "bare", tokenizer=folders / "same")
    assert found("the").input_ids == own_tokenizer(folders / "same")("the").input_ids
    assert own_tokenizer(folders / "bare") is None


def test_a_cache_of_another_tokenizer_is_refused_by_a_dry_run(folders, tmp_path, make_llama, capsys):
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row} for row in ids]
    write_cache(tmp_path / "cache", make_llama(), rows, k=4, tokenizer_hash="another")
    path = recipe(folders, tmp_path)
    assert main(["distill", path, "--dry-run", "--set", f"stages.0.cache={tmp_path / 'cache'}"]) == 2
    assert "cached with tokenizer another, here it is " in capsys.readouterr().err
