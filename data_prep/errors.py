"""What can go wrong, as three things a caller must tell apart."""


class DataPrepError(Exception):
    """The run cannot go on; the message is one line that names the file or option and what would be right."""

    exit_code = 1


class InputError(DataPrepError):
    """What was asked for cannot be done: a wrong option, source or output folder."""

    exit_code = 2


class Reject(Exception):  # noqa: N818 - an outcome of one image, not a fault of the run
    """One source that becomes no sample. `reason` is one of a few fixed phrases; `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
