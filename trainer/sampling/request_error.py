"""The error of a request that cannot be carried out."""

from typing import Any


class RequestError(ValueError):
    """A field of a request is invalid. Callers report it by the name that users know: --eta, log.samples_eta."""

    def __init__(self, field: str, value: Any, reason: str) -> None:
        super().__init__(f"{field}={value!r}: {reason}")
        self.field = field
        self.value = value
        self.reason = reason
