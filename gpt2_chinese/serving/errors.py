"""The errors of the HTTP API: a status, a code, a message, and the field that is wrong."""

from __future__ import annotations

import json

ENGINE_STOPPED = "the model has stopped; try again in a few seconds, or restart the server if it stays so"
INTERNAL_ERROR = "internal server error; the server's log has the details"


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status.
        code: what a program compares, such as "out_of_range".
        param: the name of the field that is wrong, None where no field is.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param

    def body(self) -> bytes:
        """The error as JSON in UTF-8, as OpenAI's clients expect it."""
        types = {401: "authentication_error", 429: "rate_limit_error"}
        type_ = types.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": type_, "param": self.param, "code": self.code}
        # The name of an unknown field may have an unpaired surrogate.
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", errors="replace")


def engine_stopped_error() -> ApiError:
    return ApiError(503, "engine_stopped", ENGINE_STOPPED)


def timeout_error(seconds: float, length_field: str) -> ApiError:
    """No answer within `seconds`; `length_field` is the request's name for the number of tokens."""
    message = f"no answer within {seconds:g} seconds; ask for fewer samples or a smaller {length_field}"
    return ApiError(504, "timeout", message)
