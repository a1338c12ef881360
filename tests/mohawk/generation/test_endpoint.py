"""The endpoint's client against a server of this process that answers, stalls, refuses and breaks."""

import json
import time
import urllib.parse
from email.utils import formatdate

import pytest

from mohawk.data.records import Prompt
from mohawk.errors import UserError
from mohawk.generation import endpoint as client
from mohawk.generation.decoding import Decoding
from mohawk.generation.endpoint import EndpointTeacher, base_url, read_answer, retry_after
from mohawk.generation.masking import any_of, names_secret
from tests.helpers.tiny_endpoint import Server, error

SAMPLING = Decoding(method="sample", samples=2, temperature=0.5, top_p=0.9, max_new_tokens=5)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def prompts(count=3):
    return [Prompt(f"{i:x}", f"{i:064x}", f"prompt {i}", f"p:{i + 1}") for i in range(count)]


def test_answers_come_in_order_with_all_that_is_known(server):
    teacher = EndpointTeacher(server.url, "big", SAMPLING, chat=True)
    found = dict(teacher.responses(prompts(), first=1))
    assert list(found) == [1, 2]
    seeds = [[SAMPLING.seed_of(p, s) for s in range(2)] for p in prompts()]
    for i, answers in found.items():
        assert [r.text for r in answers] == [f"prompt {i} {seed % 1000}" for seed in seeds[i]]
        assert all((r.tokens, r.finish_reason, r.logprob, r.error) == (2, "stop", -0.75, None) for r in answers)
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert sorted(b["seed"] for _, _, b in server.seen) == sorted(seeds[1] + seeds[2])
    assert body == {
        "model": "big", "max_tokens": 5, "messages": [{"role": "user", "content": body["messages"][0]["content"]}],
        "logprobs": True, "temperature": 0.5, "top_p": 0.9, "seed": body["seed"],
    }  # fmt: skip


def test_completions_key_and_further_fields(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", " secret\n")
    teacher = EndpointTeacher(
        server.url, "big", Decoding(), key_env="MY_KEY", request={"logprobs": None, "top_k": 5, "max_tokens": 9}
    )
    ((_, (response,)),) = teacher.responses(prompts(1))
    assert response.text == "prompt 0 0" and response.logprob == -3.0
    path, headers, body = server.seen[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {"model": "big", "max_tokens": 9, "prompt": "prompt 0", "temperature": 0.0, "top_k": 5}
    assert "secret" not in json.dumps(teacher.identity())


def test_many_at_once_and_still_in_order(server):
    going, most = [0], [0]

    def script(body, times):
        with server.lock:
            going[0] += 1
            most[0] = max(most[0], going[0])
        # the first prompt is the slowest
        time.sleep(0.3 if body["prompt"] == "prompt 0" else 0.02)
        with server.lock:
            going[0] -= 1
        return server.answer(body)

    server.script = script
    begin = time.monotonic()
    found = list(EndpointTeacher(server.url, "big", Decoding(), concurrency=4).responses(prompts(12)))
    assert [i for i, _ in found] == list(range(12)) and time.monotonic() - begin < 0.55
    assert 2 <= most[0] <= 4


def test_what_fails_for_now_is_tried_again(server):
    troubles = [
        (503, {}, b"<html>busy</html>"),
        None,  # the connection is closed
        (200, {}, b"{not json"),
        (200, {}, b'{"choices": []}'),
        (500, {}, error("boom")),
    ]
    server.script = lambda body, times: troubles[times] if times < len(troubles) else server.answer(body)
    found = dict(EndpointTeacher(server.url, "big", Decoding(), retries=5).responses(prompts(2)))
    assert [found[i][0].text for i in range(2)] == ["prompt 0 0", "prompt 1 0"]
    assert len(server.seen) == 12


def test_a_stalled_server_times_out(server):
    server.script = lambda body, times: time.sleep(0.5 if times == 0 else 0) or server.answer(body)
    teacher = EndpointTeacher(server.url, "big", Decoding(), timeout=0.1)
    ((_, (response,)),) = teacher.responses(prompts(1))
    assert response.text == "prompt 0 0" and len(server.seen) == 2
    server.script = lambda body, times: time.sleep(0.3) or server.answer(body)
    with pytest.raises(UserError, match="failed 2 times, at last with: no answer within 0.1 s"):
        list(EndpointTeacher(server.url, "big", Decoding(), timeout=0.1, retries=1).responses(prompts(1)))


def test_retry_after_holds_every_request(server):
    at = []

    def script(body, times):
        at.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, error("slow down")) if len(at) == 1 else server.answer(body)

    server.script = script
    teacher = EndpointTeacher(server.url, "big", Decoding(), concurrency=1)
    assert len(list(teacher.responses(prompts(3)))) == 3
    assert at[1] - at[0] >= 0.39 and at[3] - at[1] < 0.3
    assert retry_after(None) is None and retry_after("soon") is None and retry_after("7") == 7
    assert 28 < retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert retry_after(formatdate(time.time() - 30, usegmt=True)) == 0
    server.script = lambda body, times: (429, {"Retry-After": "86400"}, error("quota"))
    with pytest.raises(UserError, match=r"HTTP 429 \(quota\) and asks to wait 86400 s; run the same"):
        list(teacher.responses(prompts(1)))


def test_a_refused_prompt_is_an_answer_of_its_own(server):
    def script(body, times):
        return (400, {}, error("too\nlong")) if body["prompt"] == "prompt 1" else server.answer(body)

    server.script = script
    found = dict(EndpointTeacher(server.url, "big", Decoding()).responses(prompts()))
    assert [r.error for (r,) in found.values()] == [None, "refused by the endpoint: HTTP 400 (too long)", None]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((401, {}, error("no key")), r"answers HTTP 401 \(no key\); set the environment variable"),
        ((404, {}, error("no such model")), r"answers HTTP 404 \(no such model\); check the address and --model"),
        ((307, {"Location": "http://elsewhere/"}, b""), "it redirects to http://elsewhere/; give that address if"),
        ((405, {}, b"<html>"), r"answers HTTP 405 \(Method Not Allowed\); check the request"),
    ],
)
def test_what_a_user_has_to_set_right_stops_at_once(server, made, message):
    server.script = lambda body, times: made
    with pytest.raises(UserError, match=message) as raised:
        list(EndpointTeacher(server.url, "big", Decoding(), concurrency=1).responses(prompts()))
    assert len(server.seen) <= 2 and "\n" not in str(raised.value)


def test_a_server_that_is_not_there():
    server = Server()
    server.close()
    begin = time.monotonic()
    with pytest.raises(UserError, match="failed 3 times, at last with: .*refused"):
        list(EndpointTeacher(server.url, "big", Decoding(), retries=2).responses(prompts()))
    assert time.monotonic() - begin < 2


def test_leaving_early_stops_the_requests(server):
    server.script = lambda body, times: time.sleep(0.05) or server.answer(body)
    answers = EndpointTeacher(server.url, "big", Decoding(), concurrency=2).responses(prompts(500))
    next(answers)
    answers.close()
    time.sleep(0.2)
    count = len(server.seen)
    time.sleep(0.2)
    assert len(server.seen) == count < 20


def test_read_answer():
    message = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
    assert read_answer(message, True).logprob is None and read_answer(message, True).finish_reason == "length"
    refusal = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}], "usage": None}
    assert read_answer(refusal, True).error == "no text in the answer (finish_reason content_filter)"
    null = {"choices": [{"text": "x", "logprobs": {"token_logprobs": [None, -1.0]}}]}
    assert read_answer(null, False).logprob is None
    for broken in ([], {}, {"choices": []}, {"error": {"message": "x"}}, message):
        with pytest.raises(ValueError, match="an answer without text"):
            read_answer(broken, False)


def test_addresses():
    for given in (
        "http://h:8",
        "http://h:8/",
        "http://h:8/v1/",
        "http://h:8/v1/chat/completions",
        "http://h:8/v1/completions",
    ):
        assert base_url(given) == "http://h:8/v1"
    assert base_url("https://h/api/openai/v2") == "https://h/api/openai/v2"
    for wrong in ("h:8/v1", "ftp://h", "http://", "http://me:secret@h/v1", "http://h/v1?key=secret", "http://[::1",
                  "http://me:secret", "http://h:70000"):  # fmt: skip
        with pytest.raises(UserError) as error:
            base_url(wrong)
        assert "secret" not in str(error.value)


def test_mistakes_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="the API has no beam search"):
        EndpointTeacher("http://h", "m", Decoding(method="beam"))
    with pytest.raises(UserError, match="the environment variable MY_KEY is not set"):
        EndpointTeacher("http://h", "m", Decoding(), key_env="MY_KEY")
    with pytest.raises(UserError, match="p:1: a chat's messages, which /completions does not take; use --chat"):
        messages = [{"role": "user", "content": "hi"}]
        list(EndpointTeacher("http://h", "m", Decoding()).responses([Prompt("0", "0", messages, "p:1")]))


def with_fields(body, **fields):
    """A proper answer but for these fields: `usage`, or of the choice."""
    answer = Server.answer(body)
    for name, value in fields.items():
        (answer if name == "usage" else answer["choices"][0])[name] = value
    return answer


ODD = [
    ({"usage": {"completion_tokens": "12"}}, 'usage.completion_tokens: got "12"; allowed: a whole number, or null'),
    ({"usage": {"completion_tokens": -1}}, "usage.completion_tokens: got -1"),
    ({"usage": {"completion_tokens": True}}, "usage.completion_tokens: got true"),
    ({"usage": {"completion_tokens": 10**400}}, "usage.completion_tokens: got 1000"),
    ({"usage": {"completion_tokens": float("nan")}}, "usage.completion_tokens: got NaN"),
    ({"usage": [1]}, "an answer without text"),
    ({"finish_reason": {"a": 1}}, 'finish_reason: got {"a": 1}; allowed: a word, or null'),
    ({"finish_reason": "x" * 5000}, "finish_reason: got"),
    ({"logprobs": "none"}, "an answer without text"),
    ({"logprobs": {"token_logprobs": 5}}, "an answer without text"),
    ({"logprobs": {"token_logprobs": ["-1"]}}, 'logprobs: got "-1"; allowed: numbers, or null'),
    ({"logprobs": {"token_logprobs": [-(10**400)]}}, "logprobs: got -1000"),
    ({"text": ["a", "list"]}, "list instead of a text in the answer"),
    ({"text": "half a \ud800 character"}, "half a character, \\ud800 alone"),
]


@pytest.mark.parametrize(("fields", "words"), ODD, ids=[str(fields)[:60] for fields, _ in ODD])
def test_an_odd_field_is_that_answers_error_and_no_one_elses(server, fields, words):
    server.script = lambda body, times: (
        with_fields(body, **fields) if body["prompt"] == "prompt 1" else server.answer(body)
    )
    found = dict(EndpointTeacher(server.url, "big", Decoding(), retries=1).responses(prompts(3)))
    (odd,) = found.pop(1)
    assert words in odd.error and odd.text == ""
    assert [r.text for (r,) in found.values()] == ["prompt 0 0", "prompt 2 0"]


def test_log_probabilities_that_cannot_be_are_unknown(server):
    for logprobs, known in (([-1.0, 1e-7], True), ([0.5], False), ([-1e29, -1e31], False), ([None, -1.0], False)):
        server.script = lambda body, times, given=logprobs: with_fields(body, logprobs={"token_logprobs": given})
        ((_, (response,)),) = EndpointTeacher(server.url, "big", Decoding()).responses(prompts(1))
        assert response.logprob == (pytest.approx(sum(logprobs)) if known else None) and response.error is None


def test_a_server_that_answers_nothing_as_it_should_stops_the_run(server):
    server.script = lambda body, times: {"error": "out of order"}
    teacher = EndpointTeacher(server.url, "big", Decoding(), retries=0, concurrency=1)
    got = []
    with pytest.raises(UserError, match="failed 1 times, at last with: an answer without text"):
        got.extend(teacher.responses(prompts(20)))
    assert len(got) == client.ODD - 1


def drip(start, byte=b" ", pause=0.05):
    """Writes `start`, then one byte after another, for good."""

    def write(connection):
        connection.write(start)
        while True:
            connection.write(byte)
            connection.flush()
            time.sleep(pause)

    return write


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"HTTP/1.1 200 OK\r\nX-Slow: ",
        b"HTTP/1.1 20",
    ],
    ids=["body", "chunks", "header", "status"],
)
def test_a_server_that_drips_bytes_is_left_in_time(server, start):
    """Each byte is in time; the answer is not."""
    server.script = lambda body, times: drip(start)
    teacher = EndpointTeacher(server.url, "big", Decoding(), timeout=0.2, retries=0)
    begin = time.monotonic()
    with pytest.raises(UserError, match="the answer still came after the time for a whole one"):
        list(teacher.responses(prompts(1)))
    assert 0.9 < time.monotonic() - begin < 3.0


def test_an_endless_answer_is_left(server, monkeypatch):
    monkeypatch.setattr(client, "LARGEST_ANSWER", 1 << 20)
    start = b"HTTP/1.1 200 OK\r\n\r\n"
    server.script = lambda body, times: drip(start, byte=b"x" * 65536, pause=0)
    ((_, (response,)),) = EndpointTeacher(server.url, "big", Decoding(), retries=0).responses(prompts(1))
    assert "more than 1 MiB" in response.error


KEY = "sk-0123456789abcdef"


def test_the_key_stands_nowhere_where_a_server_echoes_it(server, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    request = {
        "user": f"me {KEY}",
        "headers": {"Authorization": "Bearer other-secret"},
        "api_key": "third-secret",
        "n": 1,
    }

    def script(body, times):
        if body["prompt"] == "prompt 1":
            return 400, {}, error(f"your key {KEY} may not")
        if times == 0:
            return 503, {}, f"busy with {KEY}".encode()
        return with_fields(body, text=f"you sent {KEY}, did you?", finish_reason=KEY)

    server.script = script
    teacher = EndpointTeacher(server.url, "big", Decoding(), request=request, retries=1)
    found = dict(teacher.responses(prompts(2)))
    assert found[0][0].text == "you sent ***, did you?" and found[0][0].finish_reason == "***"
    assert found[1][0].error == "refused by the endpoint: HTTP 400 (your key *** may not)"
    assert server.seen[0][2]["user"] == f"me {KEY}" and server.seen[0][2]["api_key"] == "third-secret"  # as given
    identity = teacher.identity()["request"]
    assert identity == {"user": "me ***", "headers": {"Authorization": "***"}, "api_key": "***", "n": 1}
    server.script = lambda body, times: (200, {}, b"{" + KEY.encode())
    ((_, (response,)),) = EndpointTeacher(server.url, "big", Decoding(), retries=0).responses(prompts(1))
    server.script = lambda body, times: (302, {"Location": f"http://elsewhere/{KEY}"}, b"")
    with pytest.raises(UserError) as raised:
        list(EndpointTeacher(server.url, "big", Decoding()).responses(prompts(1)))
    elsewhere = EndpointTeacher(f"http://127.0.0.1:1/{KEY}/v1", "big", Decoding(), retries=0)
    with pytest.raises(UserError) as unreachable:
        list(elsewhere.responses(prompts(1)))
    said = f"{caplog.text} {response.error} {raised.value} {unreachable.value} {elsewhere.base}"
    assert "***" in response.error and "***" in str(raised.value) and KEY not in said
    assert "busy with ***" in caplog.text


@pytest.mark.parametrize("key", ["k3y-7", "sk-1234", "EMPTY"])
def test_a_short_key_is_masked_where_it_is_a_word_of_its_own(server, monkeypatch, caplog, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    beside = f"x{key} and {key}9"
    said = f"Bearer {key}, ({key})\n{key} in {beside}"
    server.script = lambda body, times: with_fields(body, text=said)
    teacher = EndpointTeacher(server.url, "big", Decoding(), request={"pwd": "ab-1"}, retries=0)
    ((_, (response,)),) = teacher.responses(prompts(1))
    assert response.text == f"Bearer ***, (***)\n*** in {beside}"
    assert server.seen[0][1]["Authorization"] == f"Bearer {key}"
    # no JSON: the letters of escapes are no neighbours
    server.script = lambda body, times: (200, {}, f'{{"a": "\\n{key}", http://h/?k%3D{key}&pwd=ab-1'.encode())
    ((_, (response,)),) = teacher.responses(prompts(1))
    assert key not in response.error and "ab-1" not in response.error and response.error.count("***") == 3
    assert ("is a word of 5 letters" in caplog.text) == (key == "EMPTY") and f"{key} " not in caplog.text


@pytest.mark.parametrize("key", ["a", "I", "x1", "sk-"])
def test_a_key_that_any_text_holds_is_refused(server, monkeypatch, key):
    """Masked, it would make nonsense of the records; not masked, it would stand in them."""
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"the key in MY_KEY has fewer than 4 characters.*unset MY_KEY") as raised:
        EndpointTeacher(server.url, "big", Decoding(), key_env="MY_KEY")
    assert "\n" not in str(raised.value)


def test_control_characters_of_a_server_are_escaped(server, caplog):
    server.script = lambda body, times: (
        (503, {}, error("\x1b[2Jgone \x07\x9b31m")) if times == 0 else (401, {}, error("\x1b]0;x"))
    )
    with pytest.raises(UserError) as raised:
        list(EndpointTeacher(server.url, "big", Decoding()).responses(prompts(1)))
    assert "\\x1b]0;x" in str(raised.value)
    assert "\\x1b[2Jgone \\x07\\x9b31m" in caplog.text
    assert not any(c in caplog.text + str(raised.value) for c in "\x1b\x07\x9b")


@pytest.mark.parametrize("before", [180, 190, 198, 4090])
@pytest.mark.parametrize("kind", ["json", "text", "spaces"])
def test_a_key_across_a_cut_is_masked(server, monkeypatch, before, kind):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fill = (" " if kind == "spaces" else "x") * before
    body = error(fill + KEY) if kind == "json" else f"{fill}{KEY} no".encode()
    server.script = lambda _, times: (400, {}, body)
    ((_, (response,)),) = EndpointTeacher(server.url, "big", Decoding(), retries=0).responses(prompts(1))
    assert "HTTP 400" in response.error and KEY[:4] not in response.error
    assert kind != "spaces" or response.error == "refused by the endpoint: HTTP 400 (*** no)"
    server.script = lambda _, times: (200, {}, b"{" + body)
    ((_, (response,)),) = EndpointTeacher(server.url, "big", Decoding(), retries=0).responses(prompts(1))
    assert KEY[:4] not in response.error


SECRET_NAMES = (
    "x-api-key hf_token openai_key private_key X-Auth-Token access-token auth pwd secret password credential bearer "
    "apiKey APIKey authorization Set-Cookie hfToken credentials key token apikey client_secret"
).split()
OTHER_NAMES = (
    "max_tokens min_tokens prompt_cache_key logit_bias eos_token stop_token_ids token_logprobs tokenizer keyword "
    "top_k user author max_completion_tokens skip_special_tokens"
).split()


def test_names_of_secrets():
    assert [name for name in SECRET_NAMES if not names_secret(name)] == []
    assert [name for name in OTHER_NAMES if names_secret(name)] == []


def test_secrets_of_a_request_stand_nowhere(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    secret = "s3cret-value"
    request = {name: secret for name in SECRET_NAMES} | {name: 7 for name in OTHER_NAMES}
    request |= {KEY: 1, "headers": {"X-Auth-Token": secret}, "tools": [{"access-token": secret}, ["x-api-key", secret]]}
    request |= {"more": [{"name": "Authorization", "value": secret}, f"Bearer {secret}"], "stop": ["key", "token"]}
    server.script = lambda body, times: (400, {}, error(f"you sent {secret} and {KEY}"))
    teacher = EndpointTeacher(server.url, "big", Decoding(), request=request, retries=0)
    kept = teacher.identity()["request"]
    assert secret not in json.dumps(kept) and KEY not in json.dumps(kept)
    assert {name: kept[name] for name in OTHER_NAMES} == {name: 7 for name in OTHER_NAMES}
    assert kept["***"] == 1 and kept["headers"] == {"X-Auth-Token": "***"} and kept["stop"] == ["key", "token"]
    assert kept["tools"] == [{"access-token": "***"}, ["x-api-key", "***"]]
    assert kept["more"] == [{"name": "Authorization", "value": "***"}, "Bearer ***"]
    ((_, (response,)),) = teacher.responses(prompts(1))
    assert response.error == "refused by the endpoint: HTTP 400 (you sent *** and ***)"
    assert server.seen[0][2]["x-api-key"] == secret  # sent as given


@pytest.mark.parametrize("key", ["sk-Ab/9+x=7", "a/b%2=", 'q"\\/é😀longer'])
def test_a_key_is_found_however_its_characters_are_escaped(key):
    """By urllib with / left as it is, by servers that write %2f, by JSON that escapes / or everything."""
    percent = "".join(f"%{byte:02x}" for byte in key.encode())
    written = json.dumps(key)[1:-1]
    spelled = {key, percent, percent.upper(), urllib.parse.quote(key), urllib.parse.quote(key, safe=""), written}
    spelled |= {urllib.parse.quote(key, safe="+="), written.replace("/", "\\/")}
    spelled.add(json.dumps(key, ensure_ascii=False)[1:-1])
    units = key.encode("utf-16-be").hex()
    spelled.add("".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)))
    for text in spelled:
        assert any_of({key}).sub("***", f"at /{text}&x") == "at /***&x", text
    assert any_of({key}).sub("***", f"/{key[:-1]}!") == f"/{key[:-1]}!"
    assert any_of(set()).sub("***", "nothing") == "nothing"
