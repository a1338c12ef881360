import pytest

from mohawk.data.records import Prompt
from mohawk.errors import UserError
from mohawk.generation.decoding import Response
from mohawk.generation.filters import Filters, Judge, normalize, repetition

PROMPT = Prompt("0", "0", "what is it", "file:3")


def judged(filters: Filters, *texts, tokens=None):
    responses = [t if isinstance(t, Response) else Response(t, tokens if tokens else len(t)) for t in texts]
    return [(v.reason, v.measured) for v in Judge(filters).verdicts(PROMPT, responses)]


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    (tmp_path / "my_scoring.py").write_text(
        "def length(prompt, response):\n    return len(response) / len(prompt)\n"
        "def broken(prompt, response):\n    return {}[response]\n"
        "def words(prompt, response):\n    return response\n"
        "def nan(prompt, response):\n    return float('nan')\n"
        "def last(answer):\n    return answer.split()[-1] if answer else None\n"
        "def number(answer):\n    return 3\n"
        "value = 1\n"
    )
    monkeypatch.chdir(tmp_path)


def test_without_filters_all_but_errors_are_kept():
    assert judged(Filters(), "a", "", Response("", None, "error", error="HTTP 400")) == [
        (None, {}),
        (None, {}),
        ("error", {}),
    ]


def test_length():
    found = judged(Filters(min_tokens=2, max_tokens=4), "a", "ab", "abcd", "abcde")
    assert [reason for reason, _ in found] == ["length", None, None, "length"]
    assert found[3][1] == {"length": 5}
    # an endpoint that does not count: words
    assert judged(Filters(max_tokens=2), Response("one two"), Response("one two three"))[1] == ("length", {"length": 3})


def test_repetition():
    assert repetition("a b c d", 2) == 0
    assert repetition("a b a b a b", 2) == pytest.approx(3 / 5)  # ab ba ab ba ab
    assert repetition("a b", 4) == repetition("", 4) == 0
    found = judged(Filters(max_repetition=0.5, ngram=1), "a a a b", "a a b b")
    assert found == [(None, {"repetition": 0.5}), (None, {"repetition": 0.5})]
    assert judged(Filters(max_repetition=0.5, ngram=1), "a a a a b")[0][0] == "repetition"


def test_agreement_of_normalised_answers():
    texts = ("It is 1,200.", "it is  1200", "IT IS 1200!", "no idea")
    found = judged(Filters(min_agreement=0.75), *texts)
    assert found == [(None, {"agreement": 0.75})] * 3 + [("agreement", {"agreement": 0.25})]
    assert [r for r, _ in judged(Filters(min_agreement=0.76), *texts)] == ["agreement"] * 4
    assert normalize(" 1,200. ") == "1200" and normalize("a, b") == "a, b" and normalize(" .") is None


def test_agreement_of_an_extracted_answer():
    texts = (
        "so 3 + 4 = 7. Answer: 7",
        "Answer: 8? no. Answer: 7",
        "Answer: 9",
        "seven",
        Response("", error="HTTP 400"),
    )
    found = judged(Filters(min_agreement=0.4, answer=r"Answer: (\S+)"), *texts)
    assert [r for r, _ in found] == [None, None, "agreement", "agreement", "error"]
    assert found[0][1] == {"agreement": 0.4} and found[3][1] == {"agreement": 0.0}
    # without a group the whole match is the answer
    assert [r for r, _ in judged(Filters(min_agreement=0.6, answer=r"\d+"), "a 5", "b 5", "c 6")] == [
        None,
        None,
        "agreement",
    ]


def test_the_users_normalizer(scoring):
    found = judged(Filters(min_agreement=0.5, normalizer="my_scoring:last"), "so it is Paris", "Paris", "", "")
    assert [r for r, _ in found] == [None, None, "agreement", "agreement"]
    with pytest.raises(UserError, match="normalizer: gave int for file:3; it gives a text or None"):
        judged(Filters(min_agreement=0.5, normalizer="my_scoring:number"), "a")


def test_the_users_scorer(scoring):
    filters = Filters(scorer="my_scoring:length", min_score=0.5)
    assert judged(filters, "12345", "1234") == [(None, {"score": 0.5}), ("score", {"score": 0.4})]
    # it is asked only about what the other filters leave
    assert judged(Filters(scorer="my_scoring:broken", min_score=0, max_tokens=1), "12")[0][0] == "length"
    assert judged(Filters(scorer="my_scoring:nan", min_score=0), "12") == [("score", {"score": None})]
    assert set(filters.settings()) == {"scorer", "min_score", "scorer_sha256"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "my_scoring:broken", "min_score": 0}, "scorer: failed on an answer to file:3: KeyError: 'x'"),
        ({"scorer": "my_scoring:words", "min_score": 0}, "scorer: gave str for file:3; it gives a number"),
        ({"scorer": "my_scoring:none", "min_score": 0}, "scorer: my_scoring has no function none"),
        ({"scorer": "my_scoring:value", "min_score": 0}, "scorer: my_scoring has no function value"),
        (
            {"scorer": "no_such:f", "min_score": 0},
            "scorer: cannot import no_such: ModuleNotFoundError: No module named 'no_such'",
        ),
        (
            {"scorer": "length", "min_score": 0},
            "scorer: got 'length'; give module:function, such as scoring:score for scoring.py",
        ),
        ({"scorer": "a:b"}, "scorer and min_score belong together; give both or neither"),
        ({"max_repetition": 2}, "max_repetition: got 2; allowed: a share from 0 to 1"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens: got 3, above max_tokens 2"),
        ({"answer": "x"}, "answer and normalizer are of min_agreement; set it, or leave them out"),
        (
            {"answer": "(", "min_agreement": 0.5},
            "answer: '(' is no regular expression: missing ), unterminated subpattern at position 0",
        ),
        ({"ngram": 0}, "ngram: got 0; allowed: at least 1"),
    ],
)
def test_mistakes_are_one_line(settings, message, scoring):
    with pytest.raises(UserError) as error:
        judged(Filters(**settings), "x")
    assert str(error.value) == message


def test_a_function_without_python_code_is_known_by_its_module():
    """A built-in one has no file, and what is imported from Python's own modules has theirs."""
    assert Filters(scorer="math:sqrt", min_score=0).settings()["scorer_sha256"] is None
    assert len(Filters(scorer="os:system", min_score=0).settings()["scorer_sha256"]) == 64
