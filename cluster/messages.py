"""Protobuf messages of `tandem.internal.v1` from and to the frozen types of `cluster.types`. Checks what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .proto import tandem_internal_v1_pb2 as pb
from .types import Handoff, SampledToken, SamplingParams, SequenceSpec, StepTimeCoefficients, Urgency

MIN_SHARE, MAX_SHARE = 0.001, 1000.0
"""What a class may have (`cluster.config.SLOClass`)."""


def sampling_to_proto(params: SamplingParams) -> pb.Sampling:
    """Every field; the inverse of `sampling_from_proto` up to float32."""
    message = pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        choice=params.choice,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        top_logprobs=params.top_logprobs,
    )
    for token_id, bias in params.logit_bias:
        message.logit_bias[token_id] = bias
    return message


def sampling_from_proto(message: pb.Sampling) -> SamplingParams:
    """ValueError on numbers that no router sends (not finite, no output token)."""
    floats = {
        name: getattr(message, name)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
    }
    for name, value in floats.items():
        if not math.isfinite(value):
            raise ValueError(f"sampling.{name}: {value} is not finite")
    for token_id, bias in message.logit_bias.items():
        if not math.isfinite(bias):
            raise ValueError(f"sampling.logit_bias: {bias} of token {token_id} is not finite")
    if message.max_tokens < 1:
        raise ValueError(f"sampling.max_tokens: {message.max_tokens} is less than 1")
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        choice=message.choice,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
    )


def sequence_from_proto(
    message: pb.Sequence, *, seq_id: str, handoff: Handoff, now_s: float, vocab_size: int
) -> SequenceSpec:
    """The engine's view of one attempt; `timeout_s` becomes a deadline on this process's clock. ValueError as above,
    and for token ids that are not below `vocab_size`: a device could only fail on them, with everybody else's step.
    """
    if not message.prompt_token_ids:
        raise ValueError("sequence.prompt_token_ids: empty; a prompt has at least one token")
    if not (math.isfinite(message.timeout_s) and message.timeout_s > 0):
        raise ValueError(f"sequence.timeout_s: {message.timeout_s} is not a positive number of seconds")
    named = {
        "prompt_token_ids": message.prompt_token_ids,
        "output_token_ids": message.output_token_ids,
        "sampling.logit_bias": message.sampling.logit_bias,
    }
    for name, token_ids in named.items():
        if max(token_ids, default=0) >= vocab_size:
            raise ValueError(f"sequence.{name}: {max(token_ids)} is not in 0…{vocab_size - 1}")
    return SequenceSpec(
        seq_id=seq_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling_from_proto(message.sampling),
        handoff=handoff,
        arrival_s=now_s,
        cache_salt=message.cache_salt,
        urgency=urgency_from_proto(message.urgency, now_s),
    )


def urgency_to_proto(urgency: Urgency, now_s: float) -> pb.Urgency:
    """Deadlines travel as time that is left, because clocks differ."""
    message = pb.Urgency(slo_class=urgency.slo_class, share=urgency.share)
    if math.isfinite(urgency.deadline_s):
        message.ttft_left_s = urgency.deadline_s - now_s
    return message


def urgency_from_proto(message: pb.Urgency, now_s: float) -> Urgency:
    """An absent message is no promise and a share of 1. ValueError on numbers that no router sends."""
    share = message.share or 1.0
    if not MIN_SHARE <= share <= MAX_SHARE:
        raise ValueError(f"urgency.share: {share} is not in {MIN_SHARE:g}…{MAX_SHARE:g}")
    left_s = message.ttft_left_s if message.HasField("ttft_left_s") else math.inf
    if math.isnan(left_s):
        raise ValueError(f"urgency.ttft_left_s: {left_s} is not a number")
    return Urgency(slo_class=message.slo_class, share=share, deadline_s=now_s + left_s)


def token_to_proto(token: SampledToken) -> pb.SampledToken:
    """One drawn token with its logprobs."""
    message = pb.SampledToken(token_id=token.token_id, logprob=token.logprob)
    for token_id, logprob in token.top:
        message.top.add(token_id=token_id, logprob=logprob)
    return message


def tokens_from_proto(messages: Iterable[pb.SampledToken]) -> tuple[SampledToken, ...]:
    """The drawn tokens of one event, in order."""
    return tuple(
        [
            SampledToken(
                message.token_id,
                message.logprob if message.HasField("logprob") else None,
                tuple([(top.token_id, top.logprob) for top in message.top]) if message.top else (),
            )
            for message in messages
        ]
    )


def plain_tokens_from_proto(messages: Iterable[pb.SampledToken]) -> tuple[SampledToken, ...]:
    """The same for who asked for no logprobs: a third of the time, and it is spent for every token."""
    return tuple([SampledToken(message.token_id) for message in messages])


def step_time_to_proto(coefficients: StepTimeCoefficients) -> pb.StepTime:
    """For a worker's status."""
    return pb.StepTime(
        step_s=coefficients.step_s,
        prefill_token_s=coefficients.prefill_token_s,
        decode_row_s=coefficients.decode_row_s,
        context_token_s=coefficients.context_token_s,
    )


def step_time_from_proto(message: pb.StepTime) -> StepTimeCoefficients:
    """For the router's predictions."""
    return StepTimeCoefficients(
        step_s=message.step_s,
        prefill_token_s=message.prefill_token_s,
        decode_row_s=message.decode_row_s,
        context_token_s=message.context_token_s,
    )
