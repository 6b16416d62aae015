"""Questions to a server that speaks the OpenAI chat API: paid for once, within a budget, whatever the server does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import requests

from jaxrlhf.evaluation.judge_prompts import Question, message, schema
from jaxrlhf.files import Failure, UserError
from jaxrlhf.logs import progress

AGAIN = {408, 409, 425, 429, *range(500, 600)}
OF_THE_ITEM = {400, 413, 422}  # the request is wrong, not the key or the address
LONGEST_WAIT = 600.0  # seconds
T = TypeVar("T")
OPTIONAL = ("temperature", "response_format")  # parameters that some servers or models refuse


@dataclass(frozen=True)
class Server:
    """Where the judge is and how it may be used."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; without it none is sent
    concurrency: int = 8  # requests under way at once
    max_requests: int = 10_000  # requests that one command may send, retries included; 0 = no limit
    timeout: float = 120.0  # seconds without a sign of the server
    deadline: float = 300.0  # seconds for one whole answer, however steadily it drips
    attempts: int = 8  # of one question
    backoff: float = 1.0  # seconds before the second attempt; doubles with each


class Usage(NamedTuple):
    """What one command sent."""

    sent: int  # requests, retries included
    cached: int  # replies that an earlier command had got


@dataclass
class _Session:
    """What the threads of one command share."""

    server: Server
    key: str
    cache: IO[str]
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    sent: int = 0
    answered: int = 0
    not_before: float = 0.0  # on the monotonic clock: the server asked everyone to wait
    refused: frozenset[str] = frozenset()  # parameters that the server does not take


class _Again(Exception):
    """An attempt failed and another may not; `wait` where the server says how long to wait."""

    def __init__(self, problem: str, wait: float | None = None, connected: bool = True):
        super().__init__(problem)
        self.wait, self.connected = wait, connected


class _Stopped(Exception):
    """Another thread has failed for good."""


def replies(
    questions: Sequence[Question], server: Server, cache: Path, log: Callable[[str], None]
) -> tuple[list[str], Usage]:
    """The judge's reply to each question, "" where the server refuses to answer it. None is paid for twice.

    The cache holds a JSON object a line, {"key", "reply"}: the key is the SHA-256 of the address and of all that is
    sent. A reply is written before it counts, and a line that a crash cut off is passed over.

    Raises:
      UserError: the key, the address or the model is wrong, or `max_requests` is reached. The cache stays.
      Failure: the server fails at every attempt. The cache stays.
    """
    secret = _key(server)
    keys = [_address(q, server) for q in questions]
    known = read_cache(cache)
    todo = {k: q for k, q in zip(keys, questions, strict=True) if k not in known}
    cached = len(set(keys)) - len(todo)
    log(f"judge {server.model}: {len(todo)} replies to get, {cached} are in {cache}")
    sent = 0
    if todo:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a", encoding="utf-8") as file:
            if file.tell() and not cache.read_bytes().endswith(b"\n"):
                file.write("\n")
            session = _Session(server, secret, file)
            known |= _ask_all(todo, session)
            sent = session.sent
    return [known[k] for k in keys], Usage(sent, cached)


def read_cache(path: Path) -> dict[str, str]:
    """Key -> reply of every whole line."""
    known = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            known[record["key"]] = str(record["reply"])
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a crash
    return known


def _ask_all(todo: Mapping[str, Question], session: _Session) -> dict[str, str]:
    found = {}
    with progress("judging", len(todo)) as bar:
        # The first goes alone: a wrong key fails once, and what the server does not take is known to the others.
        first, *others = todo
        found[first] = _ask(first, todo[first], session)
        bar.update()
        with ThreadPoolExecutor(session.server.concurrency) as pool:
            asked = {pool.submit(_ask, key, todo[key], session): key for key in others}
            try:
                for done in as_completed(asked):
                    found[asked[done]] = done.result()
                    bar.update()
            except BaseException:
                session.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)  # replies under way are paid for: they are kept
                raise
    return found


def _ask(key: str, question: Question, session: _Session) -> str:
    server, failed, without = session.server, 0, session.refused
    while True:
        try:
            status, body, wait = _post(_payload(question, server, without), session)
            if status in OF_THE_ITEM and (refused := _refused(body, without)):
                without |= {refused}
                continue
            reply = _reply(status, body, wait, session)
            break
        except _Again as again:
            failed += 1
            nobody_there = not (again.connected or session.answered)
            if failed >= (3 if nobody_there else server.attempts):
                problem = f"the judge at {server.base_url} failed {failed} times in a row: {again}"
                if nobody_there:
                    raise UserError(f"{problem}; is judge_base_url right?") from None
                raise Failure(f"{problem}; replies are kept, the same command goes on from there") from None
            _pause(again.wait, failed, session)
    with session.lock:
        session.cache.write(json.dumps({"key": key, "reply": reply}) + "\n")
        session.cache.flush()
        os.fsync(session.cache.fileno())
        if reply:
            session.answered += 1
            session.refused |= without
    return reply


def _payload(question: Question, server: Server, without: frozenset[str]) -> dict[str, Any]:
    structured = "response_format" not in without
    payload: dict[str, Any] = {"model": server.model, "temperature": 0}
    payload["messages"] = [{"role": "user", "content": message(question, structured)}]
    payload["response_format"] = schema(question)
    return {k: v for k, v in payload.items() if k not in without}


def _post(payload: Mapping[str, Any], session: _Session) -> tuple[int, str, float | None]:
    """Status, body and how long the server asks to wait."""
    server = session.server
    _take_turn(session)

    def authorise(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if session.key:
            request.headers["Authorization"] = f"Bearer {session.key}"
        return request

    url = f"{server.base_url.rstrip('/')}/chat/completions"

    def post() -> tuple[requests.Response, str]:
        until = time.monotonic() + server.deadline
        # `auth` always, or requests would look for a password in the user's netrc. A redirect would carry the key on.
        options: dict[str, Any] = {"timeout": server.timeout, "allow_redirects": False, "stream": True}
        with requests.post(url, json=payload, auth=authorise, **options) as response:
            body = b"".join(takewhile(lambda _: time.monotonic() < until, response.iter_content(1 << 14)))
        return response, body.decode("utf-8", "replace")

    try:
        response, body = _within(server.deadline, post)
    except TimeoutError:
        raise _Again(f"no whole answer within {server.deadline:g} s") from None
    except requests.Timeout:
        raise _Again(f"no sign of it for {server.timeout:g} s") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise UserError(f"judge_base_url={server.base_url}: {_shown(str(error), session)}") from None
    except requests.RequestException as error:
        connected = not isinstance(error, requests.ConnectionError)
        raise _Again(_shown(f"{type(error).__name__}, {error}", session), connected=connected) from None
    return response.status_code, body, _retry_after(response.headers.get("Retry-After"))


def _within(seconds: float, f: Callable[[], T]) -> T:
    """What `f` returns or raises, if it does so in time; else `TimeoutError`, and `f` goes on without anybody.

    A thread, as nothing else ends a read that gets a byte of a header now and then.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(f())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)


def _take_turn(session: _Session) -> None:
    """Waits while the server wants to be left alone, then counts a request, before it is sent."""
    server = session.server
    while (wait := session.not_before - time.monotonic()) > 0:
        session.stop.wait(wait)
        if session.stop.is_set():
            break
    with session.lock:
        if session.stop.is_set():
            raise _Stopped
        if server.max_requests and session.sent >= server.max_requests:
            raise UserError(
                f"max_requests={server.max_requests} reached; the replies so far are kept in "
                f"{session.cache.name}, and the same command goes on from there"
            )
        session.sent += 1


def _reply(status: int, body: str, wait: float | None, session: _Session) -> str:
    server = session.server
    said = _shown(_error(body), session)
    if status == 200:
        try:
            content = json.loads(body)["choices"][0]["message"].get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Again(f"its answer is no chat completion: {said}") from None
        return _redacted(content, session) if isinstance(content, str) else ""
    if status in (401, 403):
        key = f"the key in ${server.api_key_env}" if session.key else f"to answer: ${server.api_key_env} is not set"
        raise UserError(f"the judge at {server.base_url} refuses {key} ({status}): {said}")
    if status in AGAIN and "insufficient_quota" not in body:
        if wait is not None and wait > LONGEST_WAIT:
            raise Failure(
                f"the judge at {server.base_url} asks to be left alone for {wait:.0f} s ({said}); replies are kept, "
                "the same command goes on from there"
            )
        raise _Again(f"{status}: {said}", wait)
    if status in OF_THE_ITEM and session.answered:
        return ""  # this text is too long for it, or not to its liking; others were answered
    hint = "; is --judge_base_url right, and the model's name?" if status in (404, 405) or 300 <= status < 400 else ""
    raise UserError(f"the judge at {server.base_url} answers {status} to model {server.model}: {said}{hint}")


def _refused(body: str, without: frozenset[str]) -> str | None:
    """The parameter to leave out after "bad request": the one that the server names, else the schema."""
    left = [p for p in OPTIONAL if p not in without]
    return next((p for p in left if p in body), "response_format" if "response_format" in left else None)


def _pause(wait: float | None, failed: int, session: _Session) -> None:
    """Exponential back-off with jitter, or what the server asks for, which holds for every thread."""
    backoff = session.server.backoff
    if wait is not None:
        with session.lock:
            session.not_before = max(session.not_before, time.monotonic() + wait)
    longest = backoff if wait is not None else min(backoff * 2 ** (failed - 1), 60.0)
    session.stop.wait(longest * random.uniform(0.5, 1.0))


def _retry_after(value: str | None) -> float | None:
    """Seconds, from the header's number or date (RFC 9110, 10.2.3); None where it says nothing of use."""
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _error(body: str) -> str:
    """What the server says is wrong."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return body


def _shown(text: str, session: _Session) -> str:
    """A server's words on one short line, without the key and without what would not show."""
    line = " ".join(_redacted(text, session).split())
    return "".join(c if c.isprintable() else "?" for c in line)[:200] or "nothing"


def _redacted(text: str, session: _Session) -> str:
    return text.replace(session.key, "[key]") if session.key else text


def _address(question: Question, server: Server) -> str:
    """The key of a question in the cache."""
    held = [server.base_url.rstrip("/"), _payload(question, server, frozenset())]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def _key(server: Server) -> str:
    """The key from the environment, after a look at what else could not work; "" where there is none."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", server.base_url):
        raise UserError(
            "judge_base_url must be the address of a chat API, such as http://127.0.0.1:8000/v1, with no password or "
            "key in it; a key comes from the environment, see judge_api_key_env"
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", server.api_key_env):
        raise UserError("judge_api_key_env must be the name of an environment variable, not the key itself")
    key = os.environ.get(server.api_key_env, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"${server.api_key_env} holds characters that no key has")
    return key
