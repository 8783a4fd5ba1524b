"""Uploads an exported folder to the Hugging Face Hub, with huggingface_hub and its stored login."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trainer.errors import ConversionError


def check_name(name: str) -> str:
    """Returns the name. Raises ConversionError where it is not a valid repository name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {name}: should be like name or user/name ({error})") from error
    return name


def push(folder: Path, name: str, *, message: str) -> str:
    """Create the repository if needed and upload the folder as one commit; returns its URL.

    Raises ConversionError where that fails: the folder is kept, and the message has the command to upload it.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # library, HTTP and network errors alike
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if token := get_token():
            reason = reason.replace(token, "(token)")
        raise ConversionError(
            f"--push-to-hub {name}: not uploaded ({reason}); {folder} is whole, upload it by "
            f"`hf upload {name} {folder}`"
        ) from None
    return str(repository)
