"""Errors a client may see, each with its HTTP status, OpenAI error type and gRPC code in one place.

OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. A message names the field, the value and what is
allowed.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Base of everything a front end turns into an error answer."""

    http_status = 500
    type = "internal_error"
    code: str | None = None
    grpc_code = "INTERNAL"
    """Of `grpc.StatusCode`, by its name: who has no gRPC of its own (the simulator) need not load it."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    """The request is wrong and will be wrong again; `param` names the field."""

    http_status = 400
    type = "invalid_request_error"
    grpc_code = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    """Prompt (plus max_tokens) over the model's context."""

    code = "context_length_exceeded"


class Unauthenticated(ServiceError):
    """The router wants a key, and the request has none or another one."""

    http_status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    grpc_code = "UNAUTHENTICATED"


class ModelNotFound(ServiceError):
    """No such model here."""

    http_status = 404
    type = "invalid_request_error"
    code = "model_not_found"
    grpc_code = "NOT_FOUND"


class Overloaded(ServiceError):
    """Every bounded queue is full; comes with `retry_after_s`."""

    http_status = 429
    type = "rate_limit_error"
    code = "overloaded"
    grpc_code = "RESOURCE_EXHAUSTED"


class PromiseUnattainable(Overloaded):
    """The request would be later than promised; comes with `retry_after_s` unless no idle cluster could keep it."""

    code = "slo_unattainable"


class Unavailable(ServiceError):
    """No worker can serve this now: none ready, or lost and not back within the deadline."""

    http_status = 503
    type = "service_unavailable"
    code = "unavailable"
    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The request's own time ran out."""

    http_status = 504
    type = "timeout"
    code = "deadline_exceeded"
    grpc_code = "DEADLINE_EXCEEDED"
