"""`mohawk cache --endpoint`: a server's log-probabilities of a text as the cache of a top k."""

import json

import pytest
import torch

from mohawk.cli import main
from mohawk.core.folders import MANIFEST
from mohawk.data.next_tokens import next_labels
from mohawk.data.packing import collate
from mohawk.distillation.cache import cache_teacher
from mohawk.distillation.endpoint_cache import cache_endpoint
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from mohawk.generation.prompt_logprobs import PromptScorer, asked
from mohawk.kernels.kd.interface import kd_loss
from mohawk.teacher_cache.reader import TeacherCache
from tests.helpers.tiny_endpoint import Server, error
from tests.models.conftest import tiny_teacher

KEY = "sk-not-to-be-shown-123456"


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for i in range(12):
        (folder / f"train_{i}.txt").write_text(f"Document {i} counts {', '.join(str(i * k) for k in range(7))}.\n")
    tiny_teacher(vocab_size=258, num_hidden_layers=2, bos_token_id=256, eos_token_id=257).save_pretrained(
        folder / "teacher"
    )
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def recipe_of(place, teacher=True, **stage):
    return {
        "teacher": str(place / "teacher") if teacher else None,
        "student": str(place / "teacher"),
        "data": {"train": [str(place / "train_*.txt")], "validation_share": 0.2, "cache": str(place / "cache")},
        "stages": [{"tokens": 256, "batch_size": 2, "sequence_length": 24, **stage}],
        "evaluation": {"sequence_length": 24, "tokens": 96}, "precision": "float32", "device": "cpu",
        "output": str(place / "run"),
    }  # fmt: skip


@pytest.fixture
def server(place):
    """Says what the teacher itself expects, in the way that `forms` names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "teacher").eval()
    found = Server()
    found.forms, found.texts = ("prompt_logprobs", "echo"), None

    @torch.no_grad()
    def script(body, times):
        ids = body["prompt"]
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        k = body.get("prompt_logprobs") or body.get("logprobs")

        def place_of(t):
            values, named = logprobs[t].topk(k)
            return dict(zip(named.tolist(), values.tolist(), strict=True)) | {
                ids[t + 1]: float(logprobs[t, ids[t + 1]])
            }

        places = [place_of(t) for t in range(len(ids) - 1)]
        choice = {"index": 0, "text": "", "finish_reason": "length"}
        if "prompt_logprobs" in body and "prompt_logprobs" in found.forms:
            told = [{str(i): {"logprob": value, "rank": 1} for i, value in one.items()} for one in places]
            choice["prompt_logprobs"] = [None, *told]
        elif "echo" in body and "echo" in found.forms:
            assert body["echo"] is True and body["max_tokens"] == 1

            def name(i):
                return f"token_id:{i}" if found.texts is None else found.texts.decode([i])

            choice["logprobs"] = {
                "tokens": [name(i) for i in ids] + ["x"],
                "token_logprobs": [None, *(one[i] for one, i in zip(places, ids[1:], strict=True)), -1.0],
                "top_logprobs": [None, *({name(i): value for i, value in one.items()} for one in places), {}],
            }
        return {"choices": [choice], "usage": {"completion_tokens": 1}}

    found.script = script
    yield found
    found.close()


def losses_of(cache, dataset):
    """The KL of a random student from what a cache says, over all its rows."""
    generator = torch.Generator().manual_seed(0)
    batch = collate([dataset[i] | cache.row(i, dataset[i]) for i in range(len(cache))])
    logits = 3 * torch.randn(*batch["input_ids"].shape, 258, generator=generator)
    return kd_loss(logits, cache.teacher(batch), next_labels(batch)).item()


def dataset_of(place, tokenizer):
    from mohawk.distillation.run import read_data

    recipe = DistillRecipe.from_dict(recipe_of(place))
    return read_data(recipe, tokenizer).rows(recipe.stages[0], pad=0)


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo", "texts"])
def test_the_loss_of_the_local_cache(place, tokenizer, server, tmp_path, form):
    """In every way that servers know; texts of tokens name all that are one's alone."""
    server.forms = ("echo",) if form != "prompt_logprobs" else server.forms
    server.texts = tokenizer if form == "texts" else None
    recipe = DistillRecipe.from_dict(recipe_of(place))
    local = cache_teacher(recipe, tmp_path / "local", k=16)
    asked = cache_teacher(recipe, tmp_path / "asked", k=16, endpoint={"url": server.url, "concurrency": 3})
    assert asked.layout == local.layout and asked.manifest["data"] == local.manifest["data"]
    dataset = dataset_of(place, tokenizer)
    if form == "texts":  # bytes beyond ASCII have no text of their own here, and are in the tail
        assert 0 < losses_of(asked, dataset) < losses_of(local, dataset)
        return
    assert losses_of(asked, dataset) == pytest.approx(losses_of(local, dataset), rel=1e-3)


def test_a_recipe_trains_from_it_without_the_teacher(place, server, tmp_path, monkeypatch, capsys):
    """By the command line, with a key that stands nowhere, and again after it was finished."""
    monkeypatch.setenv("THE_KEY", KEY)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe_of(place, teacher=False, cache=str(tmp_path / "answers"))))
    command = ["cache", str(path), "--output", str(tmp_path / "answers"), "--endpoint", server.url]
    assert main(command) == 2
    assert "--model: give the name by which the server knows the teacher" in capsys.readouterr().err
    command += ["--model", "big", "--key-env", "THE_KEY", "--k", "16"]
    assert main(command) == 0
    times = len(server.seen)
    assert main(command) == 0 and len(server.seen) <= times + 2  # the probe alone
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.seen)
    told = capsys.readouterr()
    assert KEY not in told.out + told.err + (tmp_path / "answers" / MANIFEST).read_text()
    assert TeacherCache(tmp_path / "answers").manifest["teacher"]["name"] == "big"
    assert main(["distill", str(path), "--dry-run"]) == 0


def test_it_goes_on_where_it_stopped(place, tokenizer, server, tmp_path):
    """A refusal in the middle stops it with one line; shards that are there are not asked for again."""
    dataset, script = dataset_of(place, tokenizer), server.script
    scorer = PromptScorer(server.url, "big", tokenizer, 8, concurrency=1, retries=0)
    server.script = lambda body, times: (400, {}, error("too long")) if len(server.seen) > 6 else script(body, times)
    options = {"vocab_size": 258, "tokenizer_hash": "t"}
    with pytest.raises(UserError, match="endpoint: http.*row [0-9]+: refused by the endpoint: HTTP 400 .too long."):
        cache_endpoint(tmp_path / "c", scorer, dataset, **options)
    assert (tmp_path / "c.unfinished").is_dir() and not (tmp_path / "c").exists()
    server.script = script
    cache = cache_endpoint(tmp_path / "c", scorer, dataset, **options)
    assert len(cache) == len(dataset)
    other = PromptScorer(server.url, "another", tokenizer, 8, concurrency=1, retries=0)
    with pytest.raises(UserError, match="made with another teacher.endpoint"):
        cache_endpoint(tmp_path / "c", other, dataset, **options)


def test_what_a_server_must_offer(place, tokenizer, server, tmp_path):
    server.forms = ()
    scorer = PromptScorer(server.url, "big", tokenizer, 8, retries=0)
    with pytest.raises(
        UserError, match="no prompt_logprobs in the answer.; a server must answer /completions of token"
    ):
        scorer.probe([1, 2, 3])
    server.forms, script = ("prompt_logprobs",), server.script

    def other_ids(body, times):
        answer = script(body, times)
        told = answer["choices"][0]["prompt_logprobs"]
        told[1] = {"7": told[1].popitem()[1]} if body["prompt"][1] != 7 else told[1]
        return answer

    server.script = other_ids
    found = PromptScorer(server.url, "big", tokenizer, 8, retries=0)
    found.form = "prompt_logprobs"
    assert "not of the ids that were sent" in (found.ask(asked([1, 2, 3], "row 0"), 0).error or "")


def test_arguments_that_do_not_go_together(place, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe_of(place, temperature=2)))
    command = ["cache", str(path), "--output", str(tmp_path / "c")]
    for more, said in {
        ("--key-env", "A"): "--key-env is of --endpoint URL",
        ("--endpoint", "http://localhost:1/v1", "--kind", "hidden"): "--kind hidden needs the teacher itself",
        ("--endpoint", "http://localhost:1/v1", "--batch-size", "2"): "with --endpoint give --concurrency",
        ("--endpoint", "http://localhost:1/v1"): "log-probabilities are at temperature 1, the stage's is 2",
    }.items():
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err


GOOD = {
    "tokens": ["a", "b", "c"],
    "token_logprobs": [None, -0.1, -0.2],
    "top_logprobs": [None, {"b": -0.1, "d": -3}, {"c": -0.2}],
}


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("echo", {"top_logprobs": 5}, "log-probabilities of a prompt: got int; allowed: a list"),
        ("echo", {"token_logprobs": {"a": 1}}, "log-probabilities of a prompt: got dict"),
        ("echo", {"top_logprobs": [None, {"token_id:-4": -0.1}, {}]}, "a token's id: got 'token_id:-4'"),
        ("echo", {"tokens": ["x", "y", "z"]}, "the prompt is echoed as other tokens; is this the model's tokenizer"),
        ("prompt_logprobs", [None, {"98": -0.1, "-7": -2}, {"99": -0.1}], "a token's id: got '-7'"),
        ("prompt_logprobs", [None, {"98": {"logprob": "NaN"}}, {"99": -0.1}], "a log-probability: got .NaN"),
    ],
)
def test_answers_that_say_nothing_of_the_prompt(tokenizer, form, change, said):
    scorer = PromptScorer("http://localhost:1/v1", "m", tokenizer, 2)
    scorer.form = form
    choice = {"prompt_logprobs": change} if form == "prompt_logprobs" else {"logprobs": {**GOOD, **change}}
    with pytest.raises(ValueError, match=said):
        scorer.read({"choices": [choice]}, asked(tokenizer.encode("abc", add_special_tokens=False), "row 0"))


def test_answers_that_are_short_or_beyond_all_numbers(tokenizer):
    scorer = PromptScorer("http://localhost:1/v1", "m", tokenizer, 2)
    scorer.form = "echo"
    a, b, c = tokenizer.encode("abc", add_special_tokens=False)
    (d,) = tokenizer.encode("d", add_special_tokens=False)
    ids = asked([a, b, c], "row 0")
    found = scorer.read({"choices": [{"logprobs": GOOD}]}, ids)
    assert found.likeliest == [{b: -0.1, d: -3.0}, {c: -0.2}]
    assert scorer.read({"choices": [{"logprobs": {**GOOD, "token_logprobs": [None]}}]}, ids).error
    scorer.form = "prompt_logprobs"
    places = [None, {str(b): -(10**400)}, {str(c): -0.2}]
    assert scorer.read({"choices": [{"prompt_logprobs": places}]}, ids).likeliest[0] == {b: -float("inf")}


def test_a_server_that_names_fewer_tokens_is_told(tokenizer, monkeypatch, caplog):
    scorer = PromptScorer("http://localhost:1/v1", "m", tokenizer, 3)
    ids = tokenizer.encode("abc", add_special_tokens=False)
    places = [None, {str(ids[1]): -0.1, "0": -3}, {str(ids[2]): -0.2, "0": -3, "1": -4}]
    monkeypatch.setattr(scorer, "_post", lambda data: {"choices": [{"prompt_logprobs": places}]})
    scorer.probe(ids)
    assert "names 2 tokens where the likeliest 3 were asked for" in caplog.text
    caplog.clear()
    scorer.k = 2
    scorer.probe(ids)
    assert not caplog.text
