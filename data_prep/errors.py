"""Three kinds of errors that callers handle differently."""


class DataPrepError(Exception):
    """The run cannot continue; the message is one line with the file or option and what is expected."""

    exit_code = 1


class InputError(DataPrepError):
    """Invalid input: a wrong option, source or output folder."""

    exit_code = 2


class Reject(Exception):  # noqa: N818 - the outcome of one image, no failure of the run
    """A source that results in no sample. `reason` is one of a few fixed phrases; `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
