"""The chat API's client against a real server that misbehaves."""

import json
import time
from email.utils import formatdate

import pytest
from judge_server import KEY, longer, serving

from jaxrlhf.evaluation import judge_client
from jaxrlhf.evaluation.judge_client import Server, read_cache, replies
from jaxrlhf.evaluation.judge_prompts import ask, read_template, verdict
from jaxrlhf.files import Failure, UserError


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def questions(n):
    template = read_template("instructions")
    return [ask(template, f"prompt {i}", "a b c" if i % 2 else "a", "b b") for i in range(n)]


def run(tmp_path, url, n=4, lines=None, **settings):
    server = Server("m", url, **({"backoff": 0.01, "concurrency": 2} | settings))
    return replies(questions(n), server, tmp_path / "judge" / "replies.jsonl", (lines or []).append)


def winners(found, n=4):
    return [verdict(r, q.labels) for r, q in zip(found, questions(n), strict=True)]


def test_a_plain_server(tmp_path):
    with serving() as (url, seen):
        found, usage = run(tmp_path, url)
    assert winners(found) == [1, 0, 1, 0]
    assert usage == (4, 0)
    request = seen[0]
    assert (request.request["model"], request.request["temperature"]) == ("m", 0)
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    schema = request.request["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]["verdict"]["enum"]) == {request.first_label, request.second_label}


FAULTS = {
    "429 with seconds": (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
    "429 with a date": (429, {"Retry-After": formatdate(0, usegmt=True)}, {}),
    "429 with nonsense": (429, {"Retry-After": "soon"}, b""),
    "500": (500, {}, b"<html>oops"),
    "503": (503, {}, {"error": "overloaded"}),
    "slow": 1.0,
    "cut off": "cut off",
    "hang up": "hang up",
    "no json": (200, {}, b"<html>ok</html>"),
    "no choices": (200, {}, {"choices": []}),
    "a list": (200, {}, [1, 2]),
    "deep": (200, {}, b"[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_tried_again(tmp_path, fault):
    with serving(faults=[None, fault, fault]) as (url, seen):
        found, usage = run(tmp_path, url, timeout=0.3)
    assert winners(found) == [1, 0, 1, 0]
    assert usage.sent == len(seen) == 6


@pytest.mark.parametrize("fault", ["drip headers", "drip body"])
def test_a_server_that_drips_is_left_after_the_deadline(tmp_path, fault):
    """A byte now and then is a sign of life, so no time-out between bytes would ever end it."""
    start = time.monotonic()
    with serving(faults=[None, fault]) as (url, seen):
        found, usage = run(tmp_path, url, timeout=5.0, deadline=0.5)
        assert winners(found) == [1, 0, 1, 0]
        assert usage.sent == len(seen) == 5
        with serving(faults=[fault] * 3) as (url, _), pytest.raises(Failure, match=r"no whole answer within 0\.2 s"):
            run(tmp_path, url, attempts=3, timeout=5.0, deadline=0.2)
    assert time.monotonic() - start < 10


def test_retry_after_holds_for_every_thread(tmp_path):
    at = []

    def judge(seen):
        at.append(time.monotonic())
        return longer(seen)

    with serving(judge, faults=[None, (429, {"Retry-After": "1"}, {})]) as (url, _):
        start = time.monotonic()
        run(tmp_path, url, n=6, concurrency=1)
    assert len(at) == 6
    assert at[1] - start >= 1.0


def test_waiting_times():
    assert judge_client._retry_after("2") == 2.0
    assert judge_client._retry_after("1.5") == 1.5
    assert judge_client._retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert judge_client._retry_after(formatdate(0, usegmt=True)) == 0.0
    assert [judge_client._retry_after(v) for v in (None, "", "soon", "-3", "nan", "inf", "1e9")] == [None] * 7


def test_a_wait_that_nobody_would_wait_for_is_an_error(tmp_path):
    with (
        serving(faults=[(429, {"Retry-After": "86400"}, {})]) as (url, seen),
        pytest.raises(Failure, match="left alone for 86400 s"),
    ):
        run(tmp_path, url)
    assert len(seen) == 1


def test_a_server_without_schemas_is_asked_in_words_and_found_out_once(tmp_path):
    with serving(faults=["no schema"] * 20) as (url, seen):
        found, usage = run(tmp_path, url)
    assert winners(found) == [1, 0, 1, 0]
    assert [s.structured for s in seen] == [True, False, False, False, False]
    assert "VERDICT: " in seen[1].text
    with serving(faults=["no schema"] * 20) as (_, seen):
        assert run(tmp_path, url)[0] == found
    assert not seen


def test_a_model_that_takes_no_temperature(tmp_path):
    refusal = (400, {}, {"error": {"message": "'temperature' does not support 0 with this model"}})
    with serving(faults=[refusal]) as (url, seen):
        run(tmp_path, url)
    assert ["temperature" in s.request for s in seen] == [True, *[False] * 4]
    assert all(s.structured for s in seen)


def test_one_text_that_the_server_refuses_has_no_verdict_and_stops_nothing(tmp_path):
    long = (400, {}, {"error": {"message": "context length exceeded"}})
    with serving(faults=[None, long, long]) as (url, seen):
        found, _ = run(tmp_path, url, concurrency=1)
    assert winners(found) == [1, None, 1, 0]
    assert [s.structured for s in seen] == [True, True, False, True, True]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_one_request_and_one_line_without_the_key(tmp_path, status, capfd):
    fault = (status, {}, {"error": {"message": f"Incorrect API key provided: {KEY}\n\x1b[31m"}})
    with serving(faults=[fault]) as (url, seen), pytest.raises(UserError) as error:
        run(tmp_path, url)
    assert len(seen) == 1
    assert f"refuses the key in $OPENAI_API_KEY ({status}): Incorrect API key provided: [key] ?[31m" in str(error.value)
    assert KEY not in "".join(capfd.readouterr())


def test_no_key_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(faults=[(401, {}, {})]) as (url, seen), pytest.raises(UserError, match=r"\$OPENAI_API_KEY is not set"):
        run(tmp_path, url)
    assert "Authorization" not in seen[0].headers


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ((404, {}, {"error": {"message": "no model m"}}), UserError, "answers 404 to model m: no model m; is"),
        ((301, {"Location": "http://127.0.0.1:1/"}, b""), UserError, "answers 301"),
        ((429, {}, {"error": {"code": "insufficient_quota", "message": "pay"}}), UserError, "answers 429 .*pay"),
        ((400, {}, {"error": {"message": "bad"}}), UserError, "answers 400 to model m: bad"),
        ((500, {}, b"down"), Failure, "failed 3 times in a row: 500: down; replies are kept"),
        ((200, {}, b"{}"), Failure, "no chat completion"),
    ],
)
def test_what_stays_wrong_is_one_line(tmp_path, fault, kind, says):
    with serving(faults=[fault] * 9) as (url, _), pytest.raises(kind, match=says) as error:
        run(tmp_path, url, attempts=3)
    assert "\n" not in str(error.value)


def test_nobody_there(tmp_path):
    with pytest.raises(UserError, match=r"failed 3 times in a row: .*is judge_base_url right"):
        run(tmp_path, "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("url", ["ftp://x/v1", "x", "http://", "http://u:p@x/v1", "http://x/v1?key=1", "http://x y/"])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(UserError, match="judge_base_url must be the address of a chat API"):
        run(tmp_path, url)


def test_keys_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb: c")
    with pytest.raises(UserError, match=r"^\$OPENAI_API_KEY holds characters that no key has$"):
        run(tmp_path, "http://x/v1")
    with pytest.raises(UserError, match="must be the name of an environment variable") as error:
        run(tmp_path, "http://x/v1", api_key_env=KEY)
    assert KEY not in str(error.value)


def test_the_budget_stops_before_it_is_exceeded_and_the_same_command_goes_on(tmp_path):
    with serving() as (url, seen):
        with pytest.raises(UserError, match="max_requests=5 reached"):
            run(tmp_path, url, n=12, max_requests=5)
        assert len(seen) == 5
        with pytest.raises(UserError, match="max_requests=5 reached"):
            run(tmp_path, url, n=12, max_requests=5)
        found, usage = run(tmp_path, url, n=12, max_requests=5)
        assert usage == (2, 10)
        assert winners(found, 12) == [1, 0] * 6
        assert len({s.text for s in seen}) == len(seen) == 12


def test_retries_count_in_the_budget(tmp_path):
    with serving(faults=[(500, {}, b"")] * 9) as (url, seen), pytest.raises(UserError, match="max_requests=3"):
        run(tmp_path, url, max_requests=3)
    assert len(seen) == 3


def test_no_more_requests_at_once_than_allowed(tmp_path):
    under_way, most = [], []

    def judge(seen):
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.02)
        under_way.pop()
        return longer(seen)

    with serving(judge) as (url, _):
        run(tmp_path, url, n=20, concurrency=3)
    assert 2 <= max(most) <= 3


def test_the_same_question_is_asked_once(tmp_path):
    server = Server("m", "", backoff=0.01)
    with serving() as (url, seen):
        server = Server("m", url, backoff=0.01)
        found, usage = replies(questions(2) * 3, server, tmp_path / "r.jsonl", print)
    assert (len(seen), usage.sent, found[:2] * 3) == (2, 2, found)


def test_a_crash_in_the_middle_loses_nothing_that_was_written(tmp_path):
    """A line cut off by a kill, and a file that does not end in a newline."""
    path = tmp_path / "judge" / "replies.jsonl"
    with serving() as (url, seen):
        whole, _ = run(tmp_path, url, n=6)
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
        seen.clear()
        assert run(tmp_path, url, n=6)[0] == whole
        assert len(seen) == 3
        seen.clear()
        assert run(tmp_path, url, n=6)[0] == whole
        assert not seen
    assert len(read_cache(path)) == 6


def test_another_model_address_or_template_is_another_question(tmp_path):
    with serving() as (url, seen), serving() as (other, also_seen):
        run(tmp_path, url)
        run(tmp_path, other)
        assert (len(seen), len(also_seen)) == (4, 4)
        replies(questions(4), Server("n", url, backoff=0.01), tmp_path / "judge" / "replies.jsonl", print)
        assert len(seen) == 8


def test_the_key_is_in_no_file(tmp_path):
    """Not even where a server sends it back."""
    with serving(lambda seen: seen.reply(True, f"your key is {KEY}")) as (url, _):
        run(tmp_path, url)
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert written
    assert not any(KEY in text for text in written)
    assert all("[key]" in json.loads(line)["reply"] for line in written[0].splitlines())
