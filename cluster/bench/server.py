"""What is asked of a server before a load: which model, how long its context, which token ids are ordinary ones."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from ..tls import ClientTLS
from ..workload.datasets import vocabulary_of
from .no_answer import NoAnswer

_ASK_TIMEOUT_S = 30.0
COMMON_IDS = range(1000, 9000)
"""Ids that are ordinary tokens in every vocabulary of ten thousand and more, for a server that cannot be asked."""
_TOKENIZERS = (("/tokenize", "prompt"), ("/tokenize", "content"), ("/extras/tokenize", "input"))
"""Path and field of vLLM and Tandem, of llama.cpp's server, of llama-cpp-python's."""


class ServerUnusable(OSError):
    """The server does not answer, or not as it should; one line."""


class ServerAbsent(ServerUnusable, NoAnswer):
    """Nothing answers there."""


class Server:
    """A server with an OpenAI-style HTTP API."""

    def __init__(
        self, base_url: str, *, api_key: str | None = None, tls: ClientTLS | None = None, prefix: str = "/v1"
    ) -> None:
        """`prefix`: what stands before /models."""
        self.base_url = base_url
        self._api_key = api_key
        self._tls = tls
        self._prefix = prefix

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """See `ask`."""
        return ask(self.base_url, path, body, api_key=self._api_key, tls=self._tls)

    def first_model(self) -> str:
        """The first model that is listed. Raises ServerUnusable."""
        listed = self.ask(f"{self._prefix}/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerUnusable(f"{self.base_url}{self._prefix}/models lists no model") from None

    def max_model_len(self, model: str) -> int | None:
        """The model's context in tokens; None: the server does not say."""
        try:
            listed = self.ask(f"{self._prefix}/models")
            found = [card.get("max_model_len") for card in listed["data"] if card.get("id") == model]
        except (ServerUnusable, KeyError, TypeError, AttributeError):
            return None
        return found[0] if found and type(found[0]) is int and found[0] > 0 else None

    def vocabulary(self, model: str) -> tuple[int, ...] | None:
        """Ordinary token ids, those of the package's prompts; None: the server has no way to tell."""
        for path, name in _TOKENIZERS:
            try:
                return vocabulary_of(lambda text: self._tokenize(path, {"model": model, name: text}))  # noqa: B023
            except ServerAbsent:
                raise
            except (ServerUnusable, KeyError, TypeError, ValueError):
                continue
        return None

    def _tokenize(self, path: str, body: Mapping[str, Any]) -> Sequence[int]:
        tokens = [int(token) for token in self.ask(path, body)["tokens"]]
        if not tokens:
            raise ValueError("no tokens")
        return tokens


def served_model(base_url: str, api_key: str | None = None, tls: ClientTLS | None = None) -> str:
    """The first model that the server lists. Raises ServerUnusable."""
    return Server(base_url, api_key=api_key, tls=tls).first_model()


def ask(
    base_url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    tls: ClientTLS | None = None,
) -> Any:
    """One short question to the server, GET or, with a body, POST; returns the answer's JSON. Raises ServerUnusable."""
    url = base_url.rstrip("/") + path
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    question = urllib.request.Request(url, data, headers)
    secure = (tls or ClientTLS()).context_for(url)
    try:
        with urllib.request.urlopen(question, timeout=_ASK_TIMEOUT_S, context=secure) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        wants = "another key" if api_key else "a key"
        hint = f": it wants {wants}; --api-key or TANDEM_API_KEY" if error.code == 401 else ""
        raise ServerUnusable(f"{url}: HTTP {error.code}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerAbsent(url, error) from None
    except ValueError as error:
        raise ServerUnusable(f"{url}: {error}") from None
