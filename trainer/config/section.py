"""What all sections of a configuration have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """A table of the file: unknown keys are errors, values are not coerced, nothing changes afterwards."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _is_writable(cls, value: Any) -> Any:
        """Everything goes into config.toml, which is UTF-8: no name with bytes that are none."""
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError("should be UTF-8, as config.toml is") from error
        return value
