"""Several teachers' rationales made one: votes counted by hand, a ranking followed, a merge that stops and goes on."""

import http.server
import json
import os
import threading
from collections import Counter

import pytest

from mohawk.cli import main
from mohawk.errors import UserError
from mohawk.generation.purify import by_prompt, completer, merge_all, merge_prompt, merged, overlap, purify, route, vote
from mohawk.losses.rationales import rationale_pairs, read_rationales
from tests.helpers.tiny_phase import fork, wait


def answers(*said, prompt="p"):
    """Candidates (teacher, label, rationale) of one prompt."""
    names = ("teacher", "label", "rationale")
    return [
        {"prompt": prompt, **dict(zip(names, row, strict=True)), "where": f"x.jsonl:{i}"}
        for i, row in enumerate(said, 1)
    ]


def test_a_vote_by_hand():
    candidates = answers(
        ("a", "4", "one two three"),
        ("b", "5", "one two three four"),
        ("c", "4.", "one two six seven"),
        ("d", " 4", "one two six"),
    )
    # words in common: a-c 2 of (3, 4), a-d 2 of (3, 3), c-d 3 of (4, 3): d has the largest sum
    scores = {"a": 4 / 7 + 4 / 6, "c": 4 / 7 + 6 / 7, "d": 4 / 6 + 6 / 7}
    assert max(scores, key=scores.get) == "d"
    assert vote(candidates) == {
        "prompt": "p",
        "label": " 4",
        "rationale": "one two six",
        "purified": {"by": "vote", "teacher": "d", "votes": {"4": ["a", "c", "d"], "5": ["b"]}},
    }
    assert vote(candidates, scorer=lambda prompt, rationale: -len(rationale))["rationale"] == "one two six"
    assert vote(candidates, scorer=lambda prompt, rationale: len(rationale))["purified"]["teacher"] == "c"


@pytest.mark.parametrize(
    ("said", "label", "rationale"),
    [
        # equal votes: the label said first; equal rationales: the one said first
        ([("a", "4", "x"), ("b", "5", "y")], "4", "x"),
        ([("a", "4", "x"), ("b", "4", "y")], "4", "x"),
        # a teacher has one vote, however often it answers
        ([("a", "4", "x"), ("a", "4", "x"), ("a", "4", "z"), ("b", "5", "y"), ("c", "5", "w")], "5", "y"),
        ([("a", "4", "x"), ("a", "5", "y"), ("a", "5", "y z"), ("b", "4", "v")], "4", "x"),
        (
            [("a", "4", "x"), ("a", "5", "y"), ("a", "5", "y z"), ("b", "4", "v"), ("c", "5", "y"), ("d", "5", "u")],
            "5",
            "y",
        ),
        # a label without rationale votes all the same
        ([("a", "5", "y"), ("b", "4", None), ("c", "4", "x")], "4", "x"),
        ([("a", "5", "y"), ("b", "4", None), ("c", "4", None)], "4", None),
        # punctuation, case, commas in numbers
        ([("a", "5", "y"), ("b", "1,000", "x"), ("c", "1000.", "x")], "1,000", "x"),
        # a label of punctuation alone is still one
        ([("a", "5", "y"), ("b", "...", "x"), ("c", "...", "x")], "...", "x"),
    ],
)
def test_ties_and_samples(said, label, rationale):
    line = vote(answers(*said))
    assert (line["label"], line["rationale"]) == (label, rationale)


def test_overlap_by_hand():
    def words(text):
        return Counter(text.split())

    assert overlap(words("a b b"), words("b b b c")) == 2 * 2 / 7
    assert overlap(words("a b"), words("a b")) == 1
    assert overlap(words("a"), words("b")) == 0 == overlap(words(""), words(""))


def test_routing_follows_the_ranking():
    candidates = answers(("a", "4", "x"), ("b", "5", None), ("c", "4", "v w"), ("c", "6", "v"), ("c", "6", "v u"))
    line = route(candidates, ["b", "c", "a"])  # b gave no reason; of c's, the vote among its own
    assert (line["label"], line["rationale"]) == ("6", "v")
    assert line["purified"] == {"by": "route", "teacher": "c", "votes": {"4": ["a", "c"], "5": ["b"], "6": ["c"]}}
    assert route(candidates[1:2], ["b", "c"])["label"] == "5"
    with pytest.raises(UserError, match=r"^gains: none of z answered x.jsonl:1; [^\n]+$"):
        route(candidates, ["z"])


def test_what_the_merging_model_is_asked():
    candidates = answers(("a", "4", "x {prompt}"), ("b", "5", None), prompt="2 {rationales} 2?")
    template = "Q {prompt}\n{rationales} {other}"
    assert merge_prompt(candidates, template) == (
        "Q 2 {rationales} 2?\nTeacher 1: x {prompt} So the answer is 4.\n\nTeacher 2: So the answer is 5. {other}"
    )
    assert "2 {rationales} 2?" in merge_prompt(candidates)
    with pytest.raises(UserError, match=r"^merge prompt: has \{rationales\} 0 times; it needs it once$"):
        merge_prompt(candidates, "{prompt}")


def test_what_is_taken_of_a_merge():
    candidates = answers(("a", "4", "x"), ("b", "4", "y"), ("c", "5", "z"))
    votes = {"4": ["a", "b"], "5": ["c"]}
    assert merged(candidates, "x and y. So the answer is 4.") == {
        "prompt": "p",
        "label": "4",
        "rationale": "x and y.",
        "purified": {"by": "merge", "teachers": ["a", "b", "c"], "votes": votes},
    }
    assert merged(candidates, "no: z. So the answer is 5.")["label"] == "5"
    for text, why in (
        ("hm", "no template matches"),
        ("q. So the answer is 6.", "a label of its own"),
        ("", "no answer"),
    ):
        line = merged(candidates, text)
        assert (line["label"], line["rationale"]) == ("4", "x")
        assert line["purified"] == {"by": "vote", "teacher": "a", "votes": votes, "merge": why}


def groups_of(count):
    """Every third prompt has one answer only."""
    many = [
        answers(("a", "4", f"x{i}"), ("b", "4", f"y{i}"), prompt=f"p{i}")[: 1 if i % 3 == 2 else 2]
        for i in range(count)
    ]
    return many


def echo(asked):
    """A model that merges, and remembers what it was asked."""

    def complete(prompts):
        asked.extend(prompts)
        return [f"merged {prompt.split('Question: ')[1].split()[0]}. So the answer is 4." for prompt in prompts]

    return complete


def test_a_killed_merge_goes_on(tmp_path):
    groups, journal, options = groups_of(10), tmp_path / "j", {"identity": {"name": "m"}, "at_once": 3}
    asked = []
    whole = merge_all(groups, echo(asked), tmp_path / "whole", **options)
    assert len(asked) == 7 and [line["prompt"] for line in whole] == [f"p{i}" for i in range(10)]
    assert whole[0]["rationale"] == "merged p0." and whole[2]["rationale"] == "x2"
    assert [line["purified"]["by"] for line in whole[:3]] == ["merge", "merge", "vote"]

    def killed():
        complete, calls = echo([]), []

        def complete_or_die(prompts):
            calls.append(prompts)
            if len(calls) == 3:
                os._exit(9)
            return complete(prompts)

        merge_all(groups, complete_or_die, journal, **options)

    assert wait(fork(killed)) == 9
    with open(journal, "ab") as file:
        file.write(b'{"prompt": "p6", "lab')  # a line cut off
    again = []
    assert merge_all(groups, echo(again), journal, **options) == whole
    assert [prompt.split("Question: ")[1].split()[0] for prompt in again] == ["p6", "p7", "p9"]
    assert merge_all(groups, echo(again), journal, **options) == whole and len(again) == 3
    assert journal.read_bytes() == (tmp_path / "whole").read_bytes()

    for other in (
        {"identity": {"name": "n"}},
        {"template": "{prompt} {rationales}"},
        {"templates": ["{rationale}: {label}"]},
    ):
        with pytest.raises(UserError, match=r"^[^\n]+: left by a merge of other data or settings; [^\n]+$"):
            merge_all(groups, echo([]), journal, **{**options, **other})


@pytest.mark.parametrize("damaged", [b"merged p1", b"\n"], ids=["letter", "end"])
def test_damaged_lines_of_a_merge_are_asked_again(damaged, tmp_path, caplog):
    groups, journal, options = groups_of(10), tmp_path / "j", {"identity": {"name": "m"}, "at_once": 3}
    whole = merge_all(groups, echo([]), journal, **options)
    header, *rows = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([header, rows[0], rows[1].replace(damaged, damaged[:-1] + b"7"), *rows[2:]]))
    asked = []
    assert merge_all(groups, echo(asked), journal, **options) == whole
    # the line behind one that lost its end is not known either; p2 has one teacher, and needs no merge
    assert [prompt.split("Question: ")[1].split()[0] for prompt in asked] == ["p1"]
    assert f"{journal}:3: damaged" in caplog.text
    content = journal.read_bytes()
    journal.write_bytes(content.replace(b'{"merge": "', b'{"merge": "0', 1))
    with pytest.raises(UserError, match="its first line is damaged") as caught:
        merge_all(groups, echo([]), journal, **options)
    head = str(caught.value).partition("write ")[2].partition(" there")[0].encode()  # what it says to write
    journal.write_bytes(head + content[content.index(b"\n") :])
    asked.clear()
    assert merge_all(groups, echo(asked), journal, **options) == whole and asked == []


def test_a_merge_of_an_earlier_version_goes_on_unverified(tmp_path, caplog):
    groups, journal, options = groups_of(10), tmp_path / "j", {"identity": {"name": "m"}, "at_once": 3}
    whole = merge_all(groups, echo([]), journal, **options)
    header, *rows = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(row.partition(b" ")[2] for row in [header, *rows[:6]]))
    asked = []
    assert merge_all(groups, echo(asked), journal, **options) == whole
    assert [prompt.split("Question: ")[1].split()[0] for prompt in asked] == ["p6", "p7", "p9"]
    assert caplog.text.count("not verified") == 1


def test_a_damaged_output_is_named_when_it_is_read(files, tmp_path, capsys):
    purify(files, tmp_path / "out.jsonl", by="vote")
    assert main(["verify", str(tmp_path)]) == 0 and read_rationales([tmp_path / "out.jsonl"])
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(content.replace(b"a", b"c", 1))
    assert main(["verify", str(tmp_path)]) == 2 and "out.jsonl: is not as it was written" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"out.jsonl: damaged \(is not as it was written\); [^\n]+ delete [^\n]+sha256"):
        read_rationales([tmp_path / "out.jsonl"])


def test_a_model_that_leaves_answers_out(tmp_path):
    with pytest.raises(ValueError, match="^complete: gave 0 texts for 2 prompts$"):
        merge_all(groups_of(2), lambda prompts: [], tmp_path / "j", identity={})


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    big = [
        {"prompt": "1+1", "response": "One and one. So the answer is 2."},
        {"prompt": "2+2", "label": 4, "rationale": "twice two"},
    ]
    mid = [
        {"prompt": "2+2", "label": "4", "rationale": "two and two"},
        {"prompt": "1+1", "label": "2", "rationale": "one and one more"},
    ]
    small = [{"prompt": "1+1", "label": "3", "rationale": "a guess"}, {"prompt": "2+2", "response": "who knows"}]
    return [write("big", big), write("mid", mid), write("small", small)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_votes_becomes_pairs(files, tmp_path, tokenizer, capsys):
    output = tmp_path / "out.jsonl"
    assert main(["purify", *map(str, files), "--by", "vote", "--output", str(output)]) == 0
    assert read(output) == [
        {
            "prompt": "1+1",
            "label": "2",
            "rationale": "One and one.",
            "purified": {"by": "vote", "teacher": "big", "votes": {"2": ["big", "mid"], "3": ["small"]}},
        },
        {
            "prompt": "2+2",
            "label": "4",
            "rationale": "twice two",
            "purified": {"by": "vote", "teacher": "big", "votes": {"4": ["big", "mid"]}},
        },
    ]
    printed = capsys.readouterr()
    assert printed.out == f"2 prompts in {output}: 2 by vote\n"
    assert "1 of 2 responses match none of the 10 templates" in printed.err
    pairs = list(rationale_pairs(read_rationales([output])))
    assert [pair["response"] for pair in pairs] == ["2", "One and one.", "4", "twice two"]
    # what is there stays
    assert main(["purify", *map(str, files), "--by", "vote", "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"error: output: {output} exists; move it away, or choose another file\n"


def test_a_file_routed_by_given_gains(files, tmp_path, capsys):
    gains, output = tmp_path / "gains.json", tmp_path / "out.jsonl"
    gains.write_text('{"gains": {"big": 0.1, "mid": 0.02, "small": 0.3}}')
    arguments = ["purify", *map(str, files), "--by", "route", "--gains", str(gains), "--output", str(output)]
    assert main(arguments) == 0
    assert [(line["rationale"], line["purified"]["teacher"]) for line in read(output)] == [
        ("a guess", "small"),
        ("twice two", "big"),
    ]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "+0.30000 nats  small",
        "+0.10000 nats  big",
        "+0.02000 nats  mid",
    ]


@pytest.fixture
def saved(make_llama, tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_llama(seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_file_routed_by_measured_gains(files, saved, tmp_path, capsys):
    held_out, output = tmp_path / "held-out.jsonl", tmp_path / "out.jsonl"
    held_out.write_text('{"prompt": "3+3", "label": "2"}\n')
    arguments = ["purify", *map(str, files), "--by", "route", "--student", str(saved), "--validation", str(held_out)]
    arguments += ["--rounds", "3", "--steps", "2", "--learning-rate", "0.003", "--output", str(output)]
    assert main(arguments) == 0
    gains = json.loads((tmp_path / "out.jsonl.gains.json").read_text())["gains"]
    assert set(gains) == {"big", "mid", "small"}
    best = max(gains, key=gains.get)
    assert read(output)[0]["purified"]["teacher"] == best
    assert capsys.readouterr().out.splitlines()[1].endswith(best)
    output.unlink()
    assert main([*arguments, "--student", "./nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --student: ./nowhere ")
    assert not output.exists()
    held_out.write_text('{"prompt": "2+2", "label": "4"}\n')
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith("validation: 1 of its prompts are trained on too, such as '2+2'\n")


def test_a_file_merged_by_a_local_model(files, saved, tmp_path, capsys):
    """A random model says nothing of use: the votes are taken, and it is said."""
    output = tmp_path / "out.jsonl"
    arguments = ["purify", *map(str, files), "--by", "merge", "--model", str(saved), "--max-new-tokens", "3"]
    short = tmp_path / "short.txt"
    short.write_text("{prompt} {rationales}")
    assert main([*arguments, "--merge-prompt", str(short), "--output", str(output)]) == 0
    assert [line["purified"]["merge"] for line in read(output)] == ["no template matches"] * 2
    assert capsys.readouterr().out.splitlines()[1] == "merge: no template matches for 2 prompts: the vote was taken"
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".out.jsonl.sha256"]
    short.write_text("{prompt}")
    arguments += ["--merge-prompt", str(short), "--output", str(tmp_path / "other.jsonl")]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "error: merge prompt: has {rationales} 0 times; it needs it once\n"


def test_a_file_merged_behind_an_endpoint(files, tmp_path, monkeypatch, capsys):
    """What is sent, and that a prompt the server refuses falls back on the vote, which is said."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body["messages"][0]["content"]))
            refused = "Question: 2+2" in asked[-1][2]
            message = {"role": "assistant", "content": "One and one more make two. So the answer is 2."}
            answer = (
                {"error": {"message": "no"}}
                if refused
                else {"choices": [{"message": message, "finish_reason": "stop"}]}
            )
            self.send_response(400 if refused else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            """Nothing on the terminal."""

    monkeypatch.setenv("MERGE_KEY", "secret")
    output = tmp_path / "out.jsonl"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        arguments = ["purify", *map(str, files), "--by", "merge", "--model", "m", "--endpoint", url, "--chat"]
        assert main([*arguments, "--key-env", "MERGE_KEY", "--output", str(output)]) == 0
        server.shutdown()
    assert {(path, key) for path, key, _ in asked} == {("/v1/chat/completions", "Bearer secret")}
    question = next(text for _, _, text in asked if "Question: 1+1" in text)
    for number, said in enumerate(["One and one. So", "one and one more So", "a guess So"], 1):
        assert f"Teacher {number}: {said} the answer is" in question
    one, other = read(output)
    assert (one["label"], one["rationale"]) == ("2", "One and one more make two.")
    assert one["purified"] == {
        "by": "merge",
        "teachers": ["big", "mid", "small"],
        "votes": {"2": ["big", "mid"], "3": ["small"]},
    }
    assert (other["rationale"], other["purified"]["merge"]) == ("twice two", "no answer")
    assert capsys.readouterr().out.splitlines() == [
        f"2 prompts in {output}: 1 by merge, 1 by vote",
        "merge: no answer for 1 prompts: the vote was taken",
    ]


def test_a_teacher_as_a_function(saved, tokenizer):
    from mohawk.generation.decoding import Decoding, local_teacher

    teacher = local_teacher(str(saved), Decoding(max_new_tokens=4))
    complete = completer(teacher)
    one, other = complete(["ab"]), complete(["cde"])
    assert complete(["ab", "cde", "ab"]) == [*one, *other, *one] and one != other


def test_nothing_is_written_when_something_is_wrong(files, tmp_path):
    output = tmp_path / "out.jsonl"
    with files[2].open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=rf"^{files[2]}:3: not JSON"):
        purify(files, output, by="vote")
    with pytest.raises(UserError, match="^by: got 'x'; allowed: vote, route, merge$"):
        purify(files[:2], output, by="x")
    with pytest.raises(UserError, match="^by: got merge without `complete`"):
        purify(files[:2], output, by="merge")
    with pytest.raises(UserError, match="is no folder; make it first$"):
        purify(files[:2], tmp_path / "no" / "out.jsonl", by="vote")

    def broken(prompts):
        raise UserError("endpoint: down")

    with pytest.raises(UserError, match="^endpoint: down$"):
        purify(files[:2], output, by="merge", complete=broken, identity={})
    assert not output.exists()
    counts = purify(files[:2], output, by="merge", complete=echo([]), identity={})
    assert counts == {"merge": 1, "vote": 1, "merge: a label of its own": 1}
    assert list(by_prompt(read(output))) == ["1+1", "2+2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--by", "vote", "--model", "m"], "--model is of --by merge; leave it out"),
        (["--by", "vote", "--gains", "g"], "--gains is of --by route; leave it out"),
        (["--by", "merge", "--scorer", "a:b"], "--scorer is of --by vote; leave it out"),
        (["--by", "merge"], "--by merge needs --model MODEL"),
        (
            ["--by", "merge", "--model", "m", "--key-env", "K"],
            "--key-env is of --endpoint URL; give one, or leave it out",
        ),
        (["--by", "route"], "--by route needs --gains FILE, or --student MODEL"),
        (["--by", "route", "--gains", "g", "--student", "s"], "--by route needs --gains FILE, or --student MODEL"),
        (["--by", "route", "--gains", "g", "--steps", "3"], "--steps is of --student MODEL; leave it out"),
        (["--by", "route", "--student", "s"], "--student needs --validation FILE"),
    ],
)
def test_options_that_do_not_go_together(options, said, capsys):
    assert main(["purify", "x.jsonl", "--output", "y.jsonl", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
