"""A server on loopback that speaks the OpenAI chat API, with a judge behind it and the faults that a test asks for."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-loopback-0123456789-secret"


class Seen:
    """What a request asks, read as a model would read it."""

    def __init__(self, request, headers):
        self.request, self.headers = request, headers
        self.text = request["messages"][0]["content"]
        blocks = re.findall(r"\[begin (\w+) (\w+)\]\n(.*?)\n\[end \1 \2\]", self.text, re.DOTALL)
        texts = [(label, re.sub(r"^\| ", "", text, flags=re.MULTILINE)) for _, label, text in blocks]
        (_, self.prompt), (self.first_label, self.first), (self.second_label, self.second) = texts
        self.structured = "response_format" in request

    def reply(self, first_wins, comparison="One is better."):
        label = self.first_label if first_wins else self.second_label
        if self.structured:
            return json.dumps({"comparison": comparison, "verdict": label})
        return f"{comparison}\nVERDICT: {label}"


def longer(seen):
    """A fair judge: the longer answer, whatever the order."""
    return seen.reply((len(seen.first), seen.first) > (len(seen.second), seen.second))


@contextmanager
def serving(judge=longer, faults=()):
    """(base_url, requests seen). `faults` are used up one a request, before the judge is asked; see `_fault`."""
    seen, left, lock = [], list(faults), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = Seen(json.loads(body), dict(self.headers))
            with lock:
                seen.append(request)
                fault = left.pop(0) if left else None
            if self.path != "/v1/chat/completions":
                return _send(self, 404, {"error": {"message": "no such path"}})
            if fault is not None and _fault(self, fault, request):
                return None
            return _send(self, 200, completion(judge(request)))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content):
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}


def _fault(handler, fault, request):
    """Whether the fault was answered; (status, headers, body) are sent as they are."""
    if fault == "cut off":
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [{"mess')
        handler.close_connection = True
        return True
    if fault == "hang up":
        handler.close_connection = True
        return True
    if fault in ("drip headers", "drip body"):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        if fault == "drip body":
            handler.wfile.write(b"no\r\nContent-Length: 5000\r\n\r\n")
        for _ in range(200):
            time.sleep(0.05)
            try:
                handler.wfile.write(b" ")
            except OSError:
                break
        handler.close_connection = True
        return True
    if isinstance(fault, float):
        time.sleep(fault)
        return True
    if fault == "no schema" and not request.structured:
        return False
    if fault == "no schema":
        fault = (400, {}, {"error": {"message": "response_format is not supported"}})
    status, headers, body = fault
    _send(handler, status, body, headers)
    return True


def _send(handler, status, body, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in dict(headers).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
