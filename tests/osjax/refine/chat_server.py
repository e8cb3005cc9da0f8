"""A server on loopback that speaks enough of OpenAI's chat protocol to answer, refuse, stall or talk junk."""

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping

KEY = "sk-never-to-be-seen-4711"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What goes back. stall: wait until the server is closed, before the headers or (`after_headers`) behind them."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stall: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A request that came in. content: what the user's message holds, a text or a list of parts."""

    model: str
    instruction: str
    content: str | list
    authorization: str

    @property
    def is_score(self) -> bool:
        return "from 1 to 7" in self.instruction


@dataclasses.dataclass
class ChatServer:
    """url: for OPENAI_BASE_URL; questions: those that came in so far; most_at_once: how many were under way."""

    url: str
    questions: list[Question] = dataclasses.field(default_factory=list)
    most_at_once: int = 0


def said(text: str | None) -> Reply:
    """A well-formed answer."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Reply(json.dumps(answer).encode(), headers={"content-type": "application/json"})


def refused(status: int) -> Reply:
    """A refusal that repeats the key, as some servers do, and asks the client to come back at once."""
    body = json.dumps({"error": {"message": f"no good: {KEY}", "type": "x", "code": None}}).encode()
    return Reply(body, status, {"content-type": "application/json", "retry-after-ms": "1"})


@contextlib.contextmanager
def serving(answer: Callable[[Question], Reply]) -> Iterator[ChatServer]:
    """A server that gives `answer` to each question, in threads of its own."""
    closing, lock, under_way = threading.Event(), threading.Lock(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            system, user = body["messages"]
            question = Question(body["model"], system["content"], user["content"], self.headers["authorization"])
            with lock:
                server.questions.append(question)
                under_way.append(question)
                server.most_at_once = max(server.most_at_once, len(under_way))
            reply = answer(question)
            with lock:
                under_way.pop()
            if reply.stall == "before_headers":
                closing.wait(30)
            with contextlib.suppress(OSError):  # the client has gone
                self._send(reply)

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.flush()
            if reply.stall == "after_headers":
                closing.wait(30)
            self.wfile.write(reply.body)

        def log_message(self, *_):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http_server.server_port}/v1")
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        closing.set()
        http_server.shutdown()
        http_server.server_close()
        thread.join()
