from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Side(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIDE_UNSPECIFIED: _ClassVar[Side]
    SIDE_PREFILL: _ClassVar[Side]
    SIDE_DECODE: _ClassVar[Side]
SIDE_UNSPECIFIED: Side
SIDE_PREFILL: Side
SIDE_DECODE: Side

class ReportRequest(_message.Message):
    __slots__ = ("metrics",)
    METRICS_FIELD_NUMBER: _ClassVar[int]
    metrics: bool
    def __init__(self, metrics: bool = ...) -> None: ...

class RouterReport(_message.Message):
    __slots__ = ("process", "pid", "ready", "reason", "requests_inside", "choices_waiting", "metrics", "attainment", "attainment_window_s", "plan_states")
    class ChoicesWaitingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class AttainmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: AttainmentTally
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[AttainmentTally, _Mapping]] = ...) -> None: ...
    class PlanStatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_INSIDE_FIELD_NUMBER: _ClassVar[int]
    CHOICES_WAITING_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ATTAINMENT_FIELD_NUMBER: _ClassVar[int]
    ATTAINMENT_WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    PLAN_STATES_FIELD_NUMBER: _ClassVar[int]
    process: int
    pid: int
    ready: bool
    reason: str
    requests_inside: int
    choices_waiting: _containers.ScalarMap[str, int]
    metrics: bytes
    attainment: _containers.MessageMap[str, AttainmentTally]
    attainment_window_s: float
    plan_states: _containers.ScalarMap[str, str]
    def __init__(self, process: _Optional[int] = ..., pid: _Optional[int] = ..., ready: bool = ..., reason: _Optional[str] = ..., requests_inside: _Optional[int] = ..., choices_waiting: _Optional[_Mapping[str, int]] = ..., metrics: _Optional[bytes] = ..., attainment: _Optional[_Mapping[str, AttainmentTally]] = ..., attainment_window_s: _Optional[float] = ..., plan_states: _Optional[_Mapping[str, str]] = ...) -> None: ...

class AttainmentTally(_message.Message):
    __slots__ = ("offered", "requests", "attained")
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ATTAINED_FIELD_NUMBER: _ClassVar[int]
    offered: int
    requests: int
    attained: int
    def __init__(self, offered: _Optional[int] = ..., requests: _Optional[int] = ..., attained: _Optional[int] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("router_id", "protocol_version", "epoch", "commands")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol_version: int
    epoch: int
    commands: _containers.RepeatedCompositeFieldContainer[Command]
    def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., epoch: _Optional[int] = ..., commands: _Optional[_Iterable[_Union[Command, _Mapping]]] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("id", "prefill", "reserve", "decode", "abort")
    ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    id: int
    prefill: PrefillRequest
    reserve: ReserveRequest
    decode: DecodeRequest
    abort: AbortRequest
    def __init__(self, id: _Optional[int] = ..., prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., reserve: _Optional[_Union[ReserveRequest, _Mapping]] = ..., decode: _Optional[_Union[DecodeRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequest, _Mapping]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id", "epoch", "credit_id", "code", "message")
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREDIT_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    id: int
    epoch: int
    credit_id: int
    code: int
    message: str
    def __init__(self, id: _Optional[int] = ..., epoch: _Optional[int] = ..., credit_id: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "choice", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "logit_bias", "top_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    choice: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias: _containers.ScalarMap[int, float]
    top_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., choice: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: bool = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., top_logprobs: _Optional[int] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("request_id", "choice", "prefill_attempt", "decode_attempt", "prompt_token_ids", "output_token_ids", "sampling", "timeout_s", "router_id", "cache_salt", "urgency")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    URGENCY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    prefill_attempt: int
    decode_attempt: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    timeout_s: float
    router_id: str
    cache_salt: bytes
    urgency: Urgency
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., prefill_attempt: _Optional[int] = ..., decode_attempt: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ..., router_id: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., urgency: _Optional[_Union[Urgency, _Mapping]] = ...) -> None: ...

class Urgency(_message.Message):
    __slots__ = ("slo_class", "share", "ttft_left_s")
    SLO_CLASS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TTFT_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    slo_class: str
    share: float
    ttft_left_s: float
    def __init__(self, slo_class: _Optional[str] = ..., share: _Optional[float] = ..., ttft_left_s: _Optional[float] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "handoff", "epoch")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    handoff: bool
    epoch: int
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., handoff: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "choice", "decode_attempt", "router_id", "context_tokens", "epoch", "urgency")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    DECODE_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    URGENCY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    decode_attempt: int
    router_id: str
    context_tokens: int
    epoch: int
    urgency: Urgency
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., decode_attempt: _Optional[int] = ..., router_id: _Optional[str] = ..., context_tokens: _Optional[int] = ..., epoch: _Optional[int] = ..., urgency: _Optional[_Union[Urgency, _Mapping]] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("credit_id", "epoch")
    CREDIT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    credit_id: int
    epoch: int
    def __init__(self, credit_id: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class PrefillPeer(_message.Message):
    __slots__ = ("worker_id", "epoch", "kv_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    kv_address: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., kv_address: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "credit_id", "epoch", "peer")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    credit_id: int
    epoch: int
    peer: PrefillPeer
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., credit_id: _Optional[int] = ..., epoch: _Optional[int] = ..., peer: _Optional[_Union[PrefillPeer, _Mapping]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "choice", "prefill_attempt", "decode_attempt", "router_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    prefill_attempt: int
    decode_attempt: int
    router_id: str
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., prefill_attempt: _Optional[int] = ..., decode_attempt: _Optional[int] = ..., router_id: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("exit", "timeout_s")
    EXIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    exit: bool
    timeout_s: float
    def __init__(self, exit: bool = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class PrefillTimings(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "cached_tokens")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    cached_tokens: int
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class DecodeTimings(_message.Message):
    __slots__ = ("queue_s", "transfer_s", "exposed_transfer_s", "transferred_bytes", "transport")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    transfer_s: float
    exposed_transfer_s: float
    transferred_bytes: int
    transport: str
    def __init__(self, queue_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., exposed_transfer_s: _Optional[float] = ..., transferred_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("request_id", "choice", "side", "attempt", "tokens", "failed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    side: Side
    attempt: int
    tokens: TokensEvent
    failed: FailedEvent
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., side: _Optional[_Union[Side, str]] = ..., attempt: _Optional[int] = ..., tokens: _Optional[_Union[TokensEvent, _Mapping]] = ..., failed: _Optional[_Union[FailedEvent, _Mapping]] = ...) -> None: ...

class TokensEvent(_message.Message):
    __slots__ = ("index", "tokens", "finish_reason", "stop_token_id", "prefill", "decode")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[SampledToken]
    finish_reason: str
    stop_token_id: int
    prefill: PrefillTimings
    decode: DecodeTimings
    def __init__(self, index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., prefill: _Optional[_Union[PrefillTimings, _Mapping]] = ..., decode: _Optional[_Union[DecodeTimings, _Mapping]] = ...) -> None: ...

class FailedEvent(_message.Message):
    __slots__ = ("reason", "message", "retryable")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    retryable: bool
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., retryable: bool = ...) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("epoch", "events", "answers", "leaving")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    events: _containers.RepeatedCompositeFieldContainer[Event]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    leaving: bool
    def __init__(self, epoch: _Optional[int] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ..., leaving: bool = ...) -> None: ...

class StepTime(_message.Message):
    __slots__ = ("step_s", "prefill_token_s", "decode_row_s", "context_token_s")
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROW_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    prefill_token_s: float
    decode_row_s: float
    context_token_s: float
    def __init__(self, step_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., decode_row_s: _Optional[float] = ..., context_token_s: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "role_version", "address", "kv_address", "protocol_version", "model", "fingerprint", "kv_layout", "max_model_len", "draining", "device", "pid", "block_size", "num_blocks", "free_blocks", "cached_blocks", "credited_blocks", "credit_limit_blocks", "waiting", "running", "held", "queued_prefill_tokens", "context_tokens", "max_waiting", "max_running", "step_time", "leases", "pulls", "streams", "integrity_ok", "preemptions_total", "prefix_queries_tokens_total", "prefix_hits_tokens_total", "steps_total", "computed_tokens_total", "holder_states", "puller_states", "pulls_total", "handoff_failures_total", "late_steps_total", "integrity_age_s", "threads", "cpus", "version", "kv_bytes", "patient_prefill_tokens", "kv_mover_pid", "max_batched_tokens", "learned_steps", "kernels", "kernels_reason", "tensor_parallel", "pipeline_stages", "other_ranks", "kv_dtype")
    class HolderStatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PullerStatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PullsTotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class HandoffFailuresTotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ROLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CREDITED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_LIMIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_OK_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HOLDER_STATES_FIELD_NUMBER: _ClassVar[int]
    PULLER_STATES_FIELD_NUMBER: _ClassVar[int]
    PULLS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FAILURES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LATE_STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_AGE_S_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    PATIENT_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_MOVER_PID_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEARNED_STEPS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_REASON_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_STAGES_FIELD_NUMBER: _ClassVar[int]
    OTHER_RANKS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    role: str
    role_version: int
    address: str
    kv_address: str
    protocol_version: int
    model: str
    fingerprint: str
    kv_layout: bytes
    max_model_len: int
    draining: bool
    device: str
    pid: int
    block_size: int
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    credited_blocks: int
    credit_limit_blocks: int
    waiting: int
    running: int
    held: int
    queued_prefill_tokens: int
    context_tokens: int
    max_waiting: int
    max_running: int
    step_time: StepTime
    leases: int
    pulls: int
    streams: int
    integrity_ok: bool
    preemptions_total: int
    prefix_queries_tokens_total: int
    prefix_hits_tokens_total: int
    steps_total: int
    computed_tokens_total: int
    holder_states: _containers.ScalarMap[str, int]
    puller_states: _containers.ScalarMap[str, int]
    pulls_total: _containers.ScalarMap[str, int]
    handoff_failures_total: _containers.ScalarMap[str, int]
    late_steps_total: int
    integrity_age_s: float
    threads: int
    cpus: _containers.RepeatedScalarFieldContainer[int]
    version: str
    kv_bytes: int
    patient_prefill_tokens: int
    kv_mover_pid: int
    max_batched_tokens: int
    learned_steps: int
    kernels: str
    kernels_reason: str
    tensor_parallel: int
    pipeline_stages: int
    other_ranks: _containers.RepeatedCompositeFieldContainer[RankProcess]
    kv_dtype: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[str] = ..., role_version: _Optional[int] = ..., address: _Optional[str] = ..., kv_address: _Optional[str] = ..., protocol_version: _Optional[int] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., kv_layout: _Optional[bytes] = ..., max_model_len: _Optional[int] = ..., draining: bool = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., credited_blocks: _Optional[int] = ..., credit_limit_blocks: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., held: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., max_waiting: _Optional[int] = ..., max_running: _Optional[int] = ..., step_time: _Optional[_Union[StepTime, _Mapping]] = ..., leases: _Optional[int] = ..., pulls: _Optional[int] = ..., streams: _Optional[int] = ..., integrity_ok: bool = ..., preemptions_total: _Optional[int] = ..., prefix_queries_tokens_total: _Optional[int] = ..., prefix_hits_tokens_total: _Optional[int] = ..., steps_total: _Optional[int] = ..., computed_tokens_total: _Optional[int] = ..., holder_states: _Optional[_Mapping[str, int]] = ..., puller_states: _Optional[_Mapping[str, int]] = ..., pulls_total: _Optional[_Mapping[str, int]] = ..., handoff_failures_total: _Optional[_Mapping[str, int]] = ..., late_steps_total: _Optional[int] = ..., integrity_age_s: _Optional[float] = ..., threads: _Optional[int] = ..., cpus: _Optional[_Iterable[int]] = ..., version: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., patient_prefill_tokens: _Optional[int] = ..., kv_mover_pid: _Optional[int] = ..., max_batched_tokens: _Optional[int] = ..., learned_steps: _Optional[int] = ..., kernels: _Optional[str] = ..., kernels_reason: _Optional[str] = ..., tensor_parallel: _Optional[int] = ..., pipeline_stages: _Optional[int] = ..., other_ranks: _Optional[_Iterable[_Union[RankProcess, _Mapping]]] = ..., kv_dtype: _Optional[str] = ...) -> None: ...

class RankProcess(_message.Message):
    __slots__ = ("pid", "host")
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    pid: int
    host: str
    def __init__(self, pid: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...
