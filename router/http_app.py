"""The HTTP front end: OpenAI's API (completions, chat, models) and what operators ask for (health, ready, metrics).

Every error, also of routing, is in OpenAI's shape. `/health` says that the process is up, `/ready` that a request
could be served now. With API keys, all but these two want `Authorization: Bearer <key>`; without one `/ready` says yes
or no, and nothing else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from collections.abc import Awaitable, Callable
from functools import lru_cache, partial

from ..cluster.metrics import CONTENT_TYPE
from .door import Door, shutting_down
from .errors import InvalidRequest, ServiceError
from .http_errors import error_json
from .http_exchange import Exchange
from .http_generate import ChatEndpoint, CompletionEndpoint
from .http_json import MAX_ECHOED_CHARS
from .http_message import ClientGone, Message
from .http_server import App
from .openai_requests import parse_messages
from .params import Fields, parse_token_ids
from .service import ModelCard

_log = logging.getLogger(__name__)

MAX_DETOKENIZE_IDS = 2**20
MODELS = "/v1/models/"
"""What follows is a model's name, slashes included."""

Handler = Callable[[Exchange], Awaitable[None]]


class _UnknownRoute(ServiceError):
    http_status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class _WrongMethod(ServiceError):
    http_status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class _WrongHost(ServiceError):
    http_status = 421
    type = "invalid_request_error"
    code = "wrong_host"


def check_host(host: str | None) -> None:
    """A router that lets in whoever reaches it on loopback must not be reached by a page whose own name was made to
    point there (DNS rebinding): such a request carries that name. ServiceError with 400 or 421.
    """
    if host is None:
        raise InvalidRequest("host: is missing; allowed: this router's address")
    if not _only_here(host):
        raise _WrongHost(
            f"host: {host[:MAX_ECHOED_CHARS]!r} is a name that a router without API keys does not answer to on "
            "loopback; allowed: localhost, an IP address, or a router with an API key"
        )


@lru_cache(64)  # clients come under few names, and an address takes long to parse
def _only_here(host: str) -> bool:
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Endpoint:
    """One route: checks host and key, runs the handler and turns whatever it raises into one answer.

    `admits`: the handler's work counts as a request inside the router, so that draining waits for it and refuses new
    ones.
    """

    def __init__(self, door: Door, handler: Handler, *, open_to_all: bool = False, admits: bool = False) -> None:
        self._door = door
        self._handler = handler
        self._open_to_all = open_to_all
        self._admits = admits

    async def __call__(self, message: Message) -> None:
        door = self._door
        exchange = Exchange(message, max_body_bytes=door.config.max_body_bytes, budget=door.bodies)
        try:
            await self._answer(exchange)
        except ClientGone:
            return
        except ServiceError as error:
            await self._fail(exchange, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._door.closing or task is None:
                raise
            task.uncancel()
            await self._fail(exchange, shutting_down())
        except Exception:
            _log.exception("unexpected error at the HTTP door")
            await self._fail(exchange, ServiceError("internal error; the router's log has more"))
        finally:
            exchange.close()

    async def _answer(self, exchange: Exchange) -> None:
        if self._door.wants_host:
            check_host(exchange.header("host"))
        if not self._open_to_all:
            self._door.check_key(exchange.header("authorization"))
        if self._admits:
            with self._door.admitted():
                await self._handler(exchange)
        else:
            await self._handler(exchange)

    async def _fail(self, exchange: Exchange, error: ServiceError) -> None:
        if self._admits and not exchange.started:
            self._door.count_refusal(error)
        try:
            await exchange.fail(error)
        except (ClientGone, TimeoutError):
            _log.debug("a client did not take its error: %s", error.message)


def build_http_app(door: Door) -> App:
    """What answers every request; state lives in `door`."""
    plain = _PlainEndpoints(door)

    def get(handler: Handler, *, open_to_all: bool = False) -> dict[str, Endpoint]:
        endpoint = Endpoint(door, handler, open_to_all=open_to_all)
        return {"GET": endpoint, "HEAD": endpoint}

    def post(handler: Handler) -> dict[str, Endpoint]:
        return {"POST": Endpoint(door, handler, admits=True)}

    routes = {
        "/v1/chat/completions": post(ChatEndpoint(door)),
        "/v1/completions": post(CompletionEndpoint(door)),
        "/tokenize": post(plain.tokenize),
        "/detokenize": post(plain.detokenize),
        "/v1/models": get(plain.models),
        f"{MODELS}{{model}}": get(plain.model),
        "/health": get(plain.health, open_to_all=True),
        "/ready": get(plain.ready, open_to_all=True),
        "/metrics": get(plain.metrics),
    }
    unknown = Endpoint(door, partial(_no_route, ", ".join(routes)), open_to_all=True)
    wrong = {path: Endpoint(door, partial(_no_method, ", ".join(of)), open_to_all=True) for path, of in routes.items()}

    async def answer(message: Message) -> None:
        path = f"{MODELS}{{model}}" if message.path.startswith(MODELS) else message.path
        methods = routes.get(path)
        await (unknown if methods is None else methods.get(message.method, wrong[path]))(message)

    return answer


async def _no_route(allowed: str, exchange: Exchange) -> None:
    raise _UnknownRoute(f"{exchange.method} {exchange.path[:MAX_ECHOED_CHARS]}: no such route; allowed: {allowed}")


async def _no_method(allowed: str, exchange: Exchange) -> None:
    error = _WrongMethod(
        f"{exchange.method} {exchange.path[:MAX_ECHOED_CHARS]}: method not allowed; allowed: {allowed}"
    )
    await exchange.send_json(error_json(error), status=error.http_status, headers={"allow": allowed})


class _PlainEndpoints:
    """Everything but generation."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def health(self, exchange: Exchange) -> None:
        await exchange.send_json({"status": "ok"})

    async def ready(self, exchange: Exchange) -> None:
        readiness = self._door.readiness()
        value: dict[str, object] = {"ready": readiness.ready}
        if self._door.knows(exchange.header("authorization")):
            router = {"pid": os.getpid(), **self._door.metrics.load(), "client_keys": self._door.key_counts}
            value |= {"reason": readiness.reason, "workers": list(readiness.workers), "router": router}
            if self._door.siblings.several:
                value["routers"] = [account.describe() for account in await self._door.siblings.accounts()]
        await exchange.send_json(value, status=200 if readiness.ready else 503)

    async def metrics(self, exchange: Exchange) -> None:
        await exchange.send_bytes(await self._door.siblings.render_metrics(), CONTENT_TYPE)

    async def models(self, exchange: Exchange) -> None:
        cards = [_card_json(card) for card in self._door.service.models()]
        await exchange.send_json({"object": "list", "data": cards})

    async def model(self, exchange: Exchange) -> None:
        await exchange.send_json(_card_json(self._door.card(exchange.path.removeprefix(MODELS))))

    async def tokenize(self, exchange: Exchange) -> None:
        """vLLM's: `{"prompt"}` or `{"messages"}` in; `{"count", "max_model_len", "tokens"}` out."""
        fields = Fields(await exchange.read_json())
        card = self._door.card(fields.string("model"))
        prompt = fields.string("prompt")
        if (prompt is None) == (fields.raw("messages") is None):
            problem = "neither it nor messages is given" if prompt is None else "given together with messages"
            raise fields.refuse("prompt", problem, "exactly one of prompt (a string) or messages (a list)")
        if prompt is None:
            ids = await self._door.encode_chat(
                parse_messages(fields),
                param="messages",
                add_generation_prompt=fields.boolean("add_generation_prompt", True),
            )
        else:
            add_special = fields.boolean("add_special_tokens", True)
            ids = await self._door.encode(prompt, add_special=add_special, param="prompt")
        await exchange.send_json({"count": len(ids), "max_model_len": card.max_model_len, "tokens": ids})

    async def detokenize(self, exchange: Exchange) -> None:
        """vLLM's: `{"tokens"}` in, `{"prompt"}` out; special tokens are shown."""
        fields = Fields(await exchange.read_json())
        self._door.card(fields.string("model"))
        if fields.raw("tokens") is None:
            raise fields.refuse("tokens", "is missing", "a list of token ids")
        tokens = fields.sequence("tokens", "token ids", MAX_DETOKENIZE_IDS)
        ids = parse_token_ids(fields, "tokens", tokens, self._door.tokenizer.vocab_size)
        await exchange.send_json({"prompt": self._door.tokenizer.decode(ids, skip_special=False)})


def _card_json(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": "tandem",
        "max_model_len": card.max_model_len,
    }
