"""One plain line for a router that does not answer, whichever library noticed it."""

from __future__ import annotations

import http.client
import re


class NoAnswer(OSError):
    """No router answers at `url`; one line."""

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(no_answer(url, error))
        self.url = url


def no_answer(url: str, error: Exception) -> str:
    """Says that no router answers at `url`, and why, without errno numbers or what was read from the wire."""
    cause = getattr(error, "reason", error)
    problem = re.sub(r"^\[Errno -?\d+\] ", "", str(cause)) or type(cause).__name__
    secure = url.lower().startswith("https:")
    garbled = isinstance(cause, http.client.HTTPException) and not isinstance(cause, OSError)
    if garbled or "illegal status line" in problem:
        problem = "what listens there does not speak HTTP; is it the gRPC port?"
    if secure and "CERTIFICATE_VERIFY_FAILED" in problem:
        problem = f"{_certificate_problem(problem)}; --ca or TANDEM_CA names who signed it"
    elif secure and re.search("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE", problem, re.IGNORECASE):
        problem = "what listens there does not speak TLS; is it http://?"
    elif secure and re.search("ALERT_CERTIFICATE_REQUIRED|ALERT_UNKNOWN_CA|BAD_CERTIFICATE", problem, re.IGNORECASE):
        problem = "it wants another client certificate; TANDEM_CLIENT_CERT and TANDEM_CLIENT_KEY name one"
    elif isinstance(cause, ConnectionResetError) or "isconnected" in problem:
        problem = f"it closed the connection{'' if secure else '; is it https://?'}"
    return f"no router answers at {url} ({problem})"


def _certificate_problem(problem: str) -> str:
    """OpenSSL's reason without its code and line."""
    reason = re.sub(r"^.*certificate verify failed: (.*?)\.?( \(_ssl.*)?$", r"\1", problem)
    return f"its certificate is not accepted: {reason}"
