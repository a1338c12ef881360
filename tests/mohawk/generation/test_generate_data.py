"""Answers written, filtered, stopped anywhere and gone on with: the files are those of a run that nothing stopped."""

import json
import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch

from mohawk.cli import main
from mohawk.data.generated import REJECTED, RESPONSES, SUMMARY
from mohawk.data.records import read_prompts, read_records
from mohawk.data.source_files import check_written
from mohawk.errors import UserError
from mohawk.generation import decoding, filters
from mohawk.generation.decoding import Decoding, LocalTeacher, Response
from mohawk.generation.endpoint import EndpointTeacher
from mohawk.generation.filters import Filters
from mohawk.generation.generate_data import generate_data
from tests.helpers.tiny_endpoint import Server, error
from tests.helpers.tiny_phase import cheap_training, fork, wait  # noqa: F401
from tests.mohawk.runs.test_distributed import two_processes

SAMPLING = Decoding(method="sample", samples=3, max_new_tokens=6, top_p=0.9)
FILTERS = Filters(max_tokens=5, min_agreement=0.3)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {'x' * (i % 4)} {i}\n" for i in range(10)) + "prompt  0\n")
    return read_prompts([path])


@pytest.fixture(scope="module")
def model(make_llama):
    model = make_llama(initializer_range=0.5)
    # a third of the ids ends an answer, so that some are short
    model.generation_config.eos_token_id = list(range(0, 256, 3))
    return model


@pytest.fixture
def teacher(model, tokenizer):
    return LocalTeacher(model, tokenizer, SAMPLING, batch_size=4, name="tiny")


def lines(folder, name=RESPONSES):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in (RESPONSES, REJECTED)}


class Scripted:
    """A teacher of given answers: `say(i, sample)` is a text or a Response."""

    chat = False

    def __init__(self, say, samples=1, name="scripted"):
        self.say, self.name = say, name
        self.decoding = Decoding(method="sample", samples=samples)

    def identity(self):
        return {"name": self.name}

    def responses(self, prompts, first=0, stop=None):
        for i in range(first, len(prompts) if stop is None else stop):
            said = [self.say(i, s) for s in range(self.decoding.samples)]
            yield i, [r if isinstance(r, Response) else Response(r, len(r.split()), "stop") for r in said]


def test_lines_say_where_they_come_from(tmp_path, prompts, teacher):
    tally = generate_data(prompts, teacher, tmp_path / "out", filters=FILTERS)
    kept, rejected = lines(tmp_path / "out"), lines(tmp_path / "out", REJECTED)
    assert (len(kept), len(rejected)) == (tally.kept, sum(tally.rejected.values()))
    assert kept and rejected and len(kept) + len(rejected) == 33
    assert Counter(line["reason"] for line in rejected) == tally.rejected
    answers = dict(teacher.responses(prompts))
    by_id = {p.id: i for i, p in enumerate(prompts)}
    for line in kept + rejected:
        i = by_id[line["prompt_id"]]
        response = answers[i][line["sample"]]
        assert line["prompt"] == prompts[i].content and line["prompt_sha256"] == prompts[i].sha256
        assert (line["response"], line["tokens"]) == (response.text, response.tokens)
        assert (line["logprob"], line["sampling_logprob"]) == (response.logprob, response.sampling_logprob)
        assert line["finish_reason"] == response.finish_reason and line["seed"] == SAMPLING.seed_of(
            prompts[i], line["sample"]
        )
        assert (line["teacher"], len(line["teacher_hash"])) == ("tiny", 16)
        assert line["decoding"] == SAMPLING.settings() and line["filters"].keys() == {"length", "agreement"}
        assert (line["filters"]["length"] > 5) == (line.get("reason") == "length")
    # equal prompts are asked again, with samples of their own
    twice = [[r.text for r in answers[i]] for i in (0, 10)]
    assert prompts[0].content == prompts[10].content and twice[0] != twice[1]
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert summary["prompts"] == 11 and summary["kept"] == len(kept) and summary["rejected"] == dict(tally.rejected)
    assert summary["tokens"] == sum(line["tokens"] for line in kept + rejected) and summary["last"]["tokens_per_s"] > 0


def counts(summary):
    return {key: summary[key] for key in ("prompts", "kept", "rejected", "tokens")}


def test_the_summary_is_of_all_that_is_in_the_folder(tmp_path, prompts, monkeypatch):
    out, path = tmp_path / "out", tmp_path / "out" / SUMMARY
    now = [0.0]
    monkeypatch.setattr("mohawk.generation.generate_data.time.monotonic", lambda: now[0])

    def teacher(stop_at=None):
        def say(i, sample):
            if i == stop_at:
                raise UserError("endpoint: gone")
            now[0] += 1.0
            return "two words" if i % 2 else "far too many words"

        return Scripted(say, samples=2)

    filters = Filters(max_tokens=3)
    generate_data(prompts[:2], teacher(), out, filters=filters)
    first = json.loads(path.read_text())
    assert counts(first) == {"prompts": 2, "kept": 2, "rejected": {"length": 2}, "tokens": 12}
    with pytest.raises(UserError, match="endpoint: gone"):
        generate_data(prompts, teacher(stop_at=7), out, filters=filters)
    stopped = json.loads(path.read_text())
    assert counts(stopped) == {"prompts": 7, "kept": 6, "rejected": {"length": 8}, "tokens": 44}
    assert (stopped["seconds"], stopped["last"]["seconds"], stopped["last"]["prompts"]) == (14.0, 10.0, 5)
    generate_data(prompts, teacher(), out, filters=filters)
    whole = json.loads(path.read_text())
    assert counts(whole) == {"prompts": 11, "kept": 10, "rejected": {"length": 12}, "tokens": 68}
    assert (whole["seconds"], whole["tokens_per_s"]) == (22.0, 3.1) and whole["last"]["prompts"] == 4
    generate_data(prompts, teacher(), out, filters=filters)  # nothing is left to do
    again = json.loads(path.read_text())
    assert {**again, "last": 0} == {**whole, "last": 0} and again["last"]["tokens_per_s"] is None


def start(teacher, prompts, out, die_at=None, count_to=None):
    """Fork a child that generates; it dies at the `die_at`-th write to the files, after half of it."""
    seen = [0]

    def body():
        import mohawk.generation.generate_data as module

        append = module.append

        def watched(file, data):
            seen[0] += 1
            if seen[0] == die_at:
                file.write(data[: len(data) // 2] if die_at % 2 else data)
                os.kill(os.getpid(), signal.SIGKILL)
            append(file, data)

        module.append = watched
        generate_data(prompts, teacher, out, filters=FILTERS)
        if count_to:
            count_to.write_text(str(seen[0]))

    return fork(body)


@pytest.mark.usefixtures("cheap_training")
def test_killed_anywhere_and_gone_on_gives_the_same_files(tmp_path, prompts, teacher):
    whole = tmp_path / "whole"
    assert wait(start(teacher, prompts, whole, count_to=tmp_path / "count")) == 0
    writes = int((tmp_path / "count").read_text())
    assert writes > 11
    for die_at in (1, 2, 5, 8, 11, writes):
        out = tmp_path / f"out{die_at}"
        assert wait(start(teacher, prompts, out, die_at)) == -signal.SIGKILL
        assert contents(out) != contents(whole) or die_at == writes
        assert wait(start(teacher, prompts, out, 3)) in (0, -signal.SIGKILL)  # and once more
        assert wait(start(teacher, prompts, out)) == 0
        assert contents(out) == contents(whole), die_at
        summary = json.loads((out / SUMMARY).read_text())
        assert counts(summary) == counts(json.loads((whole / SUMMARY).read_text()))


def test_a_power_cut_may_take_more_of_one_file(tmp_path, prompts, teacher):
    out = tmp_path / "out"
    generate_data(prompts, teacher, out, filters=FILTERS)
    expected = contents(out)
    for name in (RESPONSES, REJECTED):
        os.truncate(out / name, len(expected[name]) // 3)
        generate_data(prompts, teacher, out, filters=FILTERS)
        assert contents(out) == expected
        (out / name).unlink()
        generate_data(prompts, teacher, out, filters=FILTERS)
        assert contents(out) == expected


def test_more_prompts_may_follow(tmp_path, prompts, teacher):
    generate_data(prompts, teacher, tmp_path / "whole", filters=FILTERS)
    generate_data(prompts[:4], teacher, tmp_path / "out", filters=FILTERS)
    tally = generate_data(prompts, teacher, tmp_path / "out", filters=FILTERS)
    assert tally.prompts == 11 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    before = contents(tmp_path / "out")
    again = generate_data(prompts, teacher, tmp_path / "out", filters=FILTERS)  # nothing is left to do
    assert contents(tmp_path / "out") == before and again == tally
    with pytest.raises(UserError, match=r"holds answers to other prompts \(11, here 10\)"):
        generate_data(prompts[:10], teacher, tmp_path / "out", filters=FILTERS)
    with pytest.raises(UserError, match="holds answers to other prompts"):
        generate_data(prompts[::-1], teacher, tmp_path / "out", filters=FILTERS)


def test_other_settings_are_refused(tmp_path, prompts, model, make_llama, tokenizer, teacher):
    generate_data(prompts, teacher, tmp_path / "out", filters=FILTERS)

    def refused(message, decoding=SAMPLING, model=model, filters=FILTERS, **options):
        other = LocalTeacher(model, tokenizer, decoding, **{"name": "tiny", **options})
        with pytest.raises(UserError, match=f"made with other settings .{message}") as error:
            generate_data(prompts, other, tmp_path / "out", filters=filters)
        assert "\n" not in str(error.value)

    refused("decoding.top_p: 0.9 then, 0.8 now", Decoding(method="sample", samples=3, max_new_tokens=6, top_p=0.8))
    refused("seed: 0 then, 5 now", Decoding(method="sample", samples=3, max_new_tokens=6, top_p=0.9, seed=5))
    refused("filters.max_tokens: 5 then, 4 now", filters=Filters(max_tokens=4, min_agreement=0.3))
    refused("teacher.hash: ", model=make_llama(seed=3))
    refused("teacher.name: 'tiny' then, 'other' now", name="other")
    # memory is no part of what was asked
    generate_data(
        prompts, LocalTeacher(model, tokenizer, SAMPLING, batch_size=2, name="tiny"), tmp_path / "out", filters=FILTERS
    )


def test_one_writer_at_a_time(tmp_path, prompts):
    entered, leave = threading.Event(), threading.Event()

    def say(i, s):
        entered.set()
        assert leave.wait(10)
        return "x"

    thread = threading.Thread(target=generate_data, args=(prompts, Scripted(say), tmp_path / "out"))
    thread.start()
    assert entered.wait(10)
    try:
        with pytest.raises(UserError, match="another process is at work here"):
            generate_data(prompts, Scripted(say), tmp_path / "out")
    finally:
        leave.set()
        thread.join()
    assert len(lines(tmp_path / "out")) == 11


def test_places_that_cannot_be_written_to(tmp_path, prompts):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("x")
    for name, message in (("file", "is a file; give a folder"), ("folder", "was not written by generate-data")):
        with pytest.raises(UserError, match=message):
            generate_data(prompts, Scripted(lambda i, s: "x"), tmp_path / name)
    assert os.listdir(tmp_path / "folder") == ["mine.txt"]


def scripted(asked=None, samples=2):
    """Answers by prompt and sample, every third of them rejected by FEW; asked: gets (prompt, sample)."""

    def say(i, s):
        if asked is not None:
            asked.append((i, s))
        return f"answer {i} {s}" if (i + s) % 3 else f"a rather long answer {i} {s}"

    return Scripted(say, samples=samples)


FEW = Filters(max_tokens=3)


@pytest.mark.parametrize("name", [RESPONSES, REJECTED])
@pytest.mark.parametrize("how", ["letter", "cut", "gone", "joined", "first"])
def test_prompts_whose_lines_are_damaged_are_asked_again(how, name, tmp_path, prompts, caplog):
    out = tmp_path / "out"
    generate_data(prompts, scripted(), out, filters=FEW)
    expected = contents(out)
    rows = expected[name].splitlines(keepends=True)
    at = 0 if how == "first" else 2
    hurt = {at} if how != "joined" else {at, at + 1}
    ids = [json.loads(rows[k])["prompt_id"] for k in sorted(hurt)]
    if how in ("letter", "first"):
        rows[at] = rows[at].replace(b"answer ", b"answes ")
    elif how == "cut":
        rows[at] = rows[at][:30] + b"\n"
    else:
        rows[at] = b"" if how == "gone" else rows[at][:-1] + b" "
    (out / name).write_bytes(b"".join(rows))
    asked = []
    tally = generate_data(prompts, scripted(asked), out, filters=FEW)
    assert asked == [(i, s) for i, p in enumerate(prompts) if p.id in ids for s in (0, 1)] and asked
    assert contents(out) == expected and tally.prompts == 11
    assert how == "gone" or f"{name}:{at + 1}: damaged" in caplog.text
    again = []
    generate_data(prompts, scripted(again), out, filters=FEW)  # and is whole from then on
    assert again == [] and main(["verify", str(out)]) == 0


@pytest.mark.parametrize("how", ["zeros", "shorter", "end"])
def test_damaged_checksums_cost_no_answers(how, tmp_path, prompts):
    out = tmp_path / "out"
    generate_data(prompts, scripted(), out, filters=FEW)
    before, sums = contents(out), out / ".responses.jsonl.crc32"
    good = sums.read_bytes()
    sums.write_bytes(
        {"zeros": bytes(len(good) - 1) + b"\n", "shorter": good[:18], "end": good[:8] + b" " + good[9:]}[how]
    )
    asked = []
    with pytest.raises(UserError, match=r"\.responses\.jsonl\.crc32: damaged .*or delete it to go on") as caught:
        generate_data(prompts, scripted(asked), out, filters=FEW)
    assert "\n" not in str(caught.value) and contents(out) == before and asked == []
    sums.unlink()
    generate_data(prompts, scripted(asked), out, filters=FEW)
    assert contents(out) == before and asked == []


def test_what_lies_between_the_lines_is_taken_out(tmp_path, prompts, caplog):
    out = tmp_path / "out"
    generate_data(prompts, scripted(), out, filters=FEW)
    expected = contents(out)
    rows = expected[RESPONSES].splitlines(keepends=True)
    (out / RESPONSES).write_bytes(b"".join([*rows[:2], rows[2][:40], b"\n", *rows[2:-1]]))  # and the last one is lost
    asked = []
    generate_data(prompts, scripted(asked), out, filters=FEW)
    last = {p.id: i for i, p in enumerate(prompts)}[json.loads(rows[-1])["prompt_id"]]
    assert {i for i, _ in asked} == {last} and contents(out) == expected
    assert "responses.jsonl:3: damaged" in caplog.text and main(["verify", str(out)]) == 0


def test_verify_names_what_is_damaged_in_a_folder_of_answers(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    generate_data(prompts, scripted(), out, filters=FEW)
    assert main(["verify", str(out)]) == 0 and "4 parts, each as it was written" in " ".join(
        capsys.readouterr().out.split()
    )
    for name in (RESPONSES, REJECTED, "manifest.json", SUMMARY):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content.replace(b"e", b"f", 1))
        assert main(["verify", str(out)]) == 2
        said = capsys.readouterr().err
        assert f"{name}: " in said and "1 of 4 parts" in said
        (out / name).write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])  # its last line is lost
        assert main(["verify", str(out)]) == 2 and f"{name}: " in capsys.readouterr().err
        (out / name).unlink()
        assert main(["verify", str(out)]) == 2 and f"{name}: is missing" in capsys.readouterr().err
        (out / name).write_bytes(content)
    assert main(["verify", str(out)]) == 0


def test_damaged_answers_are_read_by_no_one(tmp_path, prompts):
    out = tmp_path / "out"
    generate_data(prompts, scripted(), out, filters=FEW)
    source = out / RESPONSES
    whole = source.read_bytes()
    assert len(list(read_records(source))) == len(whole.splitlines())
    check_written([source])
    for damaged, problem in ((whole.replace(b"answer 2", b"answer 7", 1), "not as"), (whole[:-200], "not")):
        source.write_bytes(damaged)
        for read in (lambda: list(read_records(source)), lambda: check_written([source])):
            with pytest.raises(UserError, match=rf"responses.jsonl.*{problem}.*\.responses\.jsonl\.crc32") as caught:
                read()
            assert "\n" not in str(caught.value)
    (out / ".responses.jsonl.crc32").unlink()  # a user's word that it is meant
    source.write_bytes(whole.replace(b"answer 2", b"answer 7", 1))
    assert len(list(read_records(source))) == len(whole.splitlines())


@pytest.mark.parametrize("how", ["letter", "gone", "empty"])
def test_a_damaged_manifest_is_named_and_made_again_by_the_same_command(how, tmp_path, prompts, caplog):
    out = tmp_path / "out"
    generate_data(prompts, scripted(), out, filters=FEW)
    path, before = out / "manifest.json", contents(out)
    good = path.read_bytes()
    path.write_bytes(good.replace(b"max_tokens", b"min_tokens") if how == "letter" else b"")
    if how == "gone":
        path.unlink()
    with pytest.raises(UserError, match=r"manifest.json is damaged \(is ") as caught:
        generate_data(prompts, scripted(), out, filters=Filters(max_tokens=4))
    assert "other settings" not in str(caught.value) and contents(out) == before
    generate_data(prompts, scripted(), out, filters=FEW)
    assert path.read_bytes() == good and contents(out) == before and "made again" in caplog.text


def test_a_folder_of_an_earlier_version_goes_on_unverified(tmp_path, prompts, caplog, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    generate_data(prompts, scripted(), whole, filters=FEW)
    generate_data(prompts[:4], scripted(), out, filters=FEW)
    for path in [*out.glob(".*.crc32"), *out.glob(".*.sha256")]:
        path.unlink()
    tally = generate_data(prompts, scripted(), out, filters=FEW)
    assert tally.prompts == 11 and contents(out) == contents(whole) and not list(out.glob(".*.crc32"))
    assert caplog.text.count("not verified") == 3  # the manifest, and both files
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.count("not verified") == 2


@pytest.mark.parametrize("odd", ["Infinity", "1e999", "NaN", "[1]", '"many"'])
def test_odd_numbers_that_an_earlier_version_kept_are_asked_again(odd, tmp_path, prompts, caplog):
    out, whole = tmp_path / "out", tmp_path / "whole"
    generate_data(prompts, scripted(), whole, filters=FEW)
    generate_data(prompts, scripted(), out, filters=FEW)
    for path in [*out.glob(".*.crc32"), *out.glob(".*.sha256")]:
        path.unlink()
    lines = (out / RESPONSES).read_text().splitlines()
    tokens = json.loads(lines[1])["tokens"]
    lines[1] = lines[1].replace(f'"tokens": {tokens}', f'"tokens": {odd}')
    (out / RESPONSES).write_text("\n".join(lines) + "\n")
    (out / SUMMARY).write_text(f'{{"seconds": {odd}}}')
    generate_data(prompts, scripted(), out, filters=FEW)
    assert "responses.jsonl:2: damaged, and passed over" in caplog.text
    assert contents(out) == contents(whole)


def test_lines_out_of_order_are_not_written_over(tmp_path, prompts):
    out = tmp_path / "out"
    generate_data(prompts, Scripted(lambda i, s: f"answer {i}"), out)
    rows = (out / RESPONSES).read_bytes().splitlines(keepends=True)
    damaged = b"".join([rows[1], rows[0], *rows[2:]])
    (out / RESPONSES).write_bytes(damaged)
    with pytest.raises(UserError, match=r"responses.jsonl:2: out of the prompts' order"):
        generate_data(prompts, Scripted(lambda i, s: f"answer {i}"), out)
    assert (out / RESPONSES).read_bytes() == damaged


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path, prompts, monkeypatch):
    import mohawk.generation.generate_data as module

    class Full:
        name = "responses.jsonl"

        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"responses.jsonl cannot be written \(No space left on device\); the same"):
        module.append(Full(), b"x")

    class Slow:
        got = b""

        def write(self, data):
            self.got += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    module.append(slow, b"abcdefgh")
    assert slow.got == b"abcdefgh"


def test_refusals_are_rejected_lines_once_something_was_answered(tmp_path, prompts):
    def say(i, s):
        return Response("", None, "error", error="refused: too long") if i in (0, 4) else f"answer {i}"

    tally = generate_data(prompts, Scripted(say), tmp_path / "out")
    rejected = lines(tmp_path / "out", REJECTED)
    assert tally.rejected == {"error": 2} and [r["error"] for r in rejected] == ["refused: too long"] * 2
    assert [r["prompt"] for r in rejected] == [prompts[0].content, prompts[4].content]
    assert len(lines(tmp_path / "out")) == 9


@pytest.mark.parametrize("count", [11, 3])
def test_a_request_that_is_always_refused_rejects_nothing(tmp_path, prompts, count):
    teacher = Scripted(lambda i, s: Response("", None, "error", error="refused: no such field"))
    with pytest.raises(
        UserError, match=f"none of the first {min(8, count)} prompts was answered; the first: refused: no such"
    ):
        generate_data(prompts[:count], teacher, tmp_path / "out")
    assert contents(tmp_path / "out") == {RESPONSES: b"", REJECTED: b""}
    assert generate_data(prompts[:count], Scripted(lambda i, s: "yes"), tmp_path / "out").kept == count


def test_the_command_on_a_folder_and_on_an_endpoint(tmp_path, model, tokenizer, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question": f"what is {i}"}) + "\n" for i in range(4)))
    (tmp_path / "scores.py").write_text("def short(prompt, response):\n    return -len(response)\n")
    monkeypatch.chdir(tmp_path)
    command = [
        "generate-data",
        "p.jsonl",
        "--field",
        "question",
        "--model",
        "model",
        "--output",
        "out",
        "--samples",
        "2",
    ]
    command += ["--temperature", "0.8", "--top-p", "0.9", "--max-new-tokens", "5", "--batch-size", "3"]
    command += ["--max-tokens", "4", "--scorer", "scores:short", "--min-score", "-100"]
    assert main([*command, "--limit", "2"]) == 0
    assert main(command) == 0
    said = capsys.readouterr()
    kept, rejected = lines(tmp_path / "out"), lines(tmp_path / "out", REJECTED)
    assert len(kept) + len(rejected) == 8 and f"kept {len(kept)} in out/responses.jsonl" in said.out
    assert "tokens/s" in said.out and "going on after 2 of 4 prompts" in said.err
    assert kept[0]["teacher"] == "model" and kept[0]["decoding"]["temperature"] == 0.8

    server = Server()
    try:
        command = ["generate-data", "p.jsonl", "--field", "question", "--model", "big", "--output", "remote", "--chat"]
        command += ["--endpoint", server.url, "--request", '{"top_k": 4}', "--concurrency", "2"]
        assert main([*command, "--min-tokens", "1"]) == 0
        found = lines(tmp_path / "remote")
        assert [r["response"] for r in found] == [f"what is {i} 0" for i in range(4)]
        assert found[0]["messages"] == [{"role": "user", "content": "what is 0"}] and "prompt" not in found[0]
        assert server.seen[0][2]["top_k"] == 4 and found[0]["logprob"] == -0.75
        server.script = lambda body, times: (401, {}, error("no key"))
        command[command.index("remote")] = "other"
        assert main(command) == 2
        assert "error: endpoint:" in capsys.readouterr().err
    finally:
        server.close()


def test_an_endpoint_that_fails_halfway_is_gone_on_from(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr("mohawk.generation.endpoint.PAUSE", 0.01)
    server = Server()
    try:

        def teacher():
            return EndpointTeacher(server.url, "big", SAMPLING, concurrency=3, retries=1)

        generate_data(prompts, teacher(), tmp_path / "whole")
        expected = contents(tmp_path / "whole")
        server.seen.clear()
        # later requests come first, and after sixteen of them nothing comes any more
        pauses = iter([0.05, 0.03, 0.0] * 100)

        def script(body, times):
            time.sleep(next(pauses))
            return server.answer(body) if len(server.seen) <= 16 else (503, {}, b"")

        server.script = script
        with pytest.raises(UserError, match="failed 2 times, at last with: HTTP 503 .*the same command, it goes on"):
            generate_data(prompts, teacher(), tmp_path / "out")
        written = contents(tmp_path / "out")[RESPONSES]
        assert 3 <= written.count(b"\n") < 33 and expected[RESPONSES].startswith(written)
        server.script = server.answer
        generate_data(prompts, teacher(), tmp_path / "out")
        assert contents(tmp_path / "out") == expected
    finally:
        server.close()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--endpoint", "http://h", "--dtype", "float32"],
            "--dtype is of a local teacher; leave it out, or --endpoint",
        ),
        (["--retries", "2"], "--retries is of --endpoint URL; give one, or leave it out"),
        (["--top-p", "0.5"], "--top-p needs --temperature above 0: greedy decoding has nothing to sample from"),
        (
            ["--beams", "2", "--temperature", "1"],
            "--beams and --temperature: a search draws nothing; give one of the two",
        ),
        (["--samples", "2"], "samples: got 2, but greedy decoding has one answer; set a temperature"),
        (["--endpoint", "http://h", "--request", "[1]"], "--request: got a JSON list; give an object, fields and"),
        (["--min-score", "2"], "scorer and min_score belong together; give both or neither"),
        ([], "./no-such-model does not exist (looked for /"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, extra, message):
    (tmp_path / "p.txt").write_text("one\n")
    command = [
        "generate-data",
        str(tmp_path / "p.txt"),
        "--model",
        "./no-such-model",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, *extra]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_plain_progress_has_an_estimate(tmp_path, prompts, capsys, monkeypatch):
    monkeypatch.setattr("mohawk.core.terminal.PLAIN_SECONDS", 0.0)
    generate_data(prompts[:2], Scripted(lambda i, s: time.sleep(0.01) or "two words"), tmp_path / "out")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("prompts 1/2  1 kept, 0 rejected, ") and first.endswith("tokens/s, 00:00 left")
    assert second.startswith("prompts 2/2  2 kept")


def test_secrets_of_a_request_are_not_kept_and_not_echoed(tmp_path, capsys):
    from tests.helpers.tiny_endpoint import Server

    (tmp_path / "p.txt").write_text("one\n")
    server = Server()
    line = ["generate-data", str(tmp_path / "p.txt"), "--model", "m", "--endpoint", server.url, "--output"]
    line += [str(tmp_path / "out"), "--request"]
    secret = {"x-api-key": "s3cret-1", "headers": {"X-Auth-Token": "s3cret-2"}, "pwd": "s3cret-3", "top_k": 5}
    try:
        assert main([*line, json.dumps(secret)]) == 0
        path = tmp_path / "out" / "manifest.json"
        kept = {"x-api-key": "***", "headers": {"X-Auth-Token": "***"}, "pwd": "***", "top_k": 5}
        manifest = json.loads(path.read_text())
        assert manifest["settings"]["teacher"]["request"] == kept
        manifest["settings"]["teacher"]["request"] = secret  # as an earlier version kept it
        path.write_text(json.dumps(manifest))
        (tmp_path / "out" / ".manifest.json.sha256").unlink()
        assert main([*line, json.dumps({**secret, "top_k": 6})]) == 2
        said = capsys.readouterr()
        assert "teacher.request.top_k: 5 then, 6 now" in said.err and "s3cret" not in said.out + said.err
        assert main([*line, json.dumps(secret)]) == 0
        assert "s3cret" not in "".join(file.read_text() for file in (tmp_path / "out").iterdir() if file.is_file())
    finally:
        server.close()


def no_room(rank):
    decoding.device_bytes = lambda device: 1


def broken_judge(rank):
    def verdicts(self, prompt, responses):
        raise RuntimeError("a bug")

    filters.Judge.verdicts = verdicts


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_several_processes_write_what_one_does(prompts, model, tokenizer, tmp_path):
    """Batches lie across prompts; then the teacher is in parts, and goes on with what one process has begun."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["generate-data", str(tmp_path / "prompts.txt"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--samples", "3", "--temperature", "1", "--max-new-tokens", "6", "--batch-size", "4"]
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    assert main([*command, "--output", str(one)]) == 0
    tmp_path.joinpath("said").mkdir()
    assert two_processes(tmp_path / "said", *command, "--output", str(two)) == [0, 0]
    assert contents(two) == contents(one)
    assert main([*command, "--output", str(parts), "--limit", "3"]) == 0
    assert two_processes(tmp_path / "said", *command, "--output", str(parts), before=no_room) == [0, 0]
    mine, theirs = lines(one), lines(parts)
    for a, b in zip(mine, theirs, strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3) and a["response"] == b["response"]
    # what the first process refuses ends the others
    assert two_processes(tmp_path / "said", *command, "--output", str(two), "--seed", "7") == [2, 2]
    said = (tmp_path / "said/0.txt").read_text()
    assert "holds answers made with other settings" in said and "Traceback" not in said
    assert not (tmp_path / "said/1.txt").read_text()
    bug = two_processes(tmp_path / "said", *command, "--output", str(tmp_path / "new"), before=broken_judge)
    assert 0 not in bug
    assert "a bug" in (tmp_path / "said/0.txt").read_text()
    assert (tmp_path / "said/1.txt").read_text().endswith("SystemExit: 1\n")
