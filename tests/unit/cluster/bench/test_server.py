"""What servers of several makes answer when they are asked for a model, its context and its vocabulary."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tandem.cluster.bench import server as bench_server
from tandem.cluster.bench.server import Server, ServerAbsent, ServerUnusable, ask

Answers = dict[tuple[str, str], Any]


def serve(monkeypatch: pytest.MonkeyPatch, answers: Answers) -> Server:
    """A server that knows these (path, field of the body), and has nothing else."""

    def ask(base_url: str, path: str, body: Any = None, **_: Any) -> Any:
        field = next((name for name in body if name != "model"), "") if body else ""
        if (path, field) not in answers:
            raise ServerUnusable(f"{path}: HTTP 404")
        answer = answers[path, field]
        return answer(body[field]) if callable(answer) else answer

    monkeypatch.setattr(bench_server, "ask", ask)
    return Server("http://h:1")


def letters(text: str) -> dict[str, list[int]]:
    return {"tokens": [ord(letter) for letter in text]}


@pytest.mark.parametrize("where", [("/tokenize", "prompt"), ("/tokenize", "content"), ("/extras/tokenize", "input")])
def test_each_makes_tokenizer_is_found(monkeypatch: pytest.MonkeyPatch, where: tuple[str, str]) -> None:
    found = serve(monkeypatch, {where: letters}).vocabulary("m")
    assert found is not None
    assert ord("e") in found


@pytest.mark.parametrize("answer", [{"tokens": []}, {"tokens": "abc"}, {}, [], 3])
def test_a_server_that_tells_nothing_has_no_vocabulary(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    assert serve(monkeypatch, {("/tokenize", "prompt"): answer}).vocabulary("m") is None
    assert serve(monkeypatch, {}).vocabulary("m") is None


def test_nobody_there_is_an_error_all_the_same() -> None:
    with pytest.raises(ServerAbsent, match="no router answers"):
        Server("http://127.0.0.1:1").vocabulary("m")


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"id": "a", "max_model_len": 512}, {"id": "b"}, {"id": "c", "max_model_len": "many"}]
    server = serve(monkeypatch, {("/v1/models", ""): {"data": cards}})
    assert server.first_model() == "a"
    assert [server.max_model_len(name) for name in ("a", "b", "c", "d")] == [512, None, None, None]
    for odd in ({"data": []}, {}, [], {"data": [3]}):
        server = serve(monkeypatch, {("/v1/models", ""): odd})
        assert server.max_model_len("a") is None
        with pytest.raises(ServerUnusable, match="lists no model"):
            server.first_model()


class _Closed(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_error(401)


@pytest.mark.parametrize(("key", "wanted"), [(None, "it wants a key"), ("k", "it wants another key")])
def test_a_server_that_wants_a_key_is_said_to(key: str | None, wanted: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ServerUnusable, match=f"HTTP 401: {wanted}; --api-key"):
                ask(f"http://127.0.0.1:{server.server_address[1]}", "/v1/models", api_key=key)
        finally:
            server.shutdown()
