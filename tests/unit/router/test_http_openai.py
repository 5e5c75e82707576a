"""The `openai` client, unchanged, against the real HTTP front end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tandem.router.errors import Overloaded, Unavailable

TEXT = "Héllo, wörld"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(front: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_chat(client: openai.OpenAI, front: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is None
    tokens = len(TEXT.encode())
    prompt_tokens = len(front.service.requests[0].prompt_token_ids)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, tokens)
    assert answer.usage.total_tokens == prompt_tokens + tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert bytes(front.service.requests[0].prompt_token_ids) == b"user: Hi\nassistant: "


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode())
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_choices_are_kept_apart(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, max_tokens=4)
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "Hél", "length"),
        (1, "Hél", "length"),
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    texts = {0: "", 1: ""}
    roles = []
    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        roles.append(chunk.choices[0].delta.role)
    assert texts == {0: TEXT, 1: TEXT}
    assert roles[:2] == ["assistant", "assistant"]
    assert not any(roles[2:])


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    call: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=stream, max_tokens=3
    )
    if stream:
        entries = [e for c in call for e in ((c.choices[0].logprobs and c.choices[0].logprobs.content) or [])]
    else:
        entries = call.choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in entries] == [b"H", b"\xc3", b"\xa9"]
    assert [entry.token for entry in entries] == ["H", "bytes:\\xc3", "bytes:\\xa9"]
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [("a", -1.0), ("b", -2.0)]
    assert entries[0].logprob == -0.5


def test_completion(client: openai.OpenAI, front: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="Once", seed=-1)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert front.service.requests[0].prompt_token_ids == tuple(b"Once")
    assert front.service.requests[0].sampling.seed == 2**64 - 1


def test_completion_prompts_and_choices(client: openai.OpenAI, front: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=["ab", "cd", "ef"], n=2, echo=True)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [p + TEXT for p in ("ab", "ab", "cd", "cd", "ef", "ef")]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 6 * len(TEXT.encode())
    assert len({request.request_id for request in front.service.requests}) == 3


@pytest.mark.parametrize(("prompt", "ids"), [([65, 66], [(65, 66)]), ([[65], [66, 67]], [(65,), (66, 67)])])
def test_completion_of_token_ids(client: openai.OpenAI, front: Any, prompt: Any, ids: Any) -> None:
    texts: dict[int, str] = {}
    for chunk in client.completions.create(model="tiny", prompt=prompt, stream=True, echo=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [request.prompt_token_ids for request in front.service.requests] == ids
    assert texts == {index: bytes(prompt_ids).decode() + TEXT for index, prompt_ids in enumerate(ids)}


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="a", logprobs=1, max_tokens=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["H", "bytes:\\xc3", "bytes:\\xa9", "l"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -1.0, "H": -0.5}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tandem"
    with pytest.raises(openai.NotFoundError, match="model: 'other'"):
        client.models.retrieve("other")


def test_errors_have_openais_classes(client: openai.OpenAI, front: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: 3 is out of range") as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="256 tokens, but the prompt has 300") as long:
        client.completions.create(model="tiny", prompt="x" * 300)
    assert long.value.code == "context_length_exceeded"
    front.service.error = Overloaded("the queue is full", retry_after_s=2.5)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)  # type: ignore[call-overload]
        assert full.value.response.headers["retry-after"] == "3"
        assert full.value.response.headers["retry-after-ms"] == "2500"
    front.service.error = Unavailable("no decode worker")
    with pytest.raises(openai.InternalServerError) as gone:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert gone.value.status_code == 503


def test_an_error_after_the_stream_began_reaches_the_client(client: openai.OpenAI, front: Any) -> None:
    front.service.error, front.service.fail_at = Unavailable("the decode worker is lost"), 3
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    received = []
    with pytest.raises(openai.APIError, match="the decode worker is lost"):
        received.extend(iter(stream))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received) == "Hé"


def test_the_options_arrive(client: openai.OpenAI, front: Any) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *MESSAGES],
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        stop=["a", "b", "a"],
        logit_bias={"65": -100},
        user="me",
        metadata={"a": "b"},
        extra_headers={"x-request-id": "mine", "x-request-timeout-s": "2.5"},
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [1, 2],
            "skip_special_tokens": False,
            "never_heard_of": {"x": 1},
        },
    )
    [request] = front.service.requests
    s = request.sampling
    assert bytes(request.prompt_token_ids).startswith(b"system: be brief\nuser: Hi\n")
    assert (s.max_tokens, s.temperature, s.top_p, s.presence_penalty, s.frequency_penalty) == (5, 0.0, 0.5, 1.0, -1.0)
    assert (s.seed, s.logit_bias, s.top_k, s.min_p, s.repetition_penalty) == (7, ((65, -100.0),), 5, 0.1, 1.5)
    assert (s.min_tokens, s.ignore_eos, s.stop_token_ids, s.top_logprobs) == (2, True, (1, 2), None)
    assert (request.stop, request.skip_special_tokens, request.n) == (("a", "b"), False, 1)
    assert (request.timeout_s, request.client_request_id) == (2.5, "mine")
