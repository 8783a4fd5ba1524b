"""An exported folder on the Hugging Face Hub, by its own library and with the login that it knows."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trainer.errors import ConversionError


def check_name(name: str) -> str:
    """The same. Raises ConversionError where no repository can be called so."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {name}: should be like name or user/name ({error})") from error
    return name


def push(folder: Path, name: str, *, message: str) -> str:
    """Make the repository where there is none and upload the folder as one commit; returns its URL.

    Raises ConversionError where that fails: the folder stays, and the message says how to go on.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # of the library, of HTTP, of the network: all the same to whoever waits for it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if token := get_token():
            reason = reason.replace(token, "(token)")
        raise ConversionError(
            f"--push-to-hub {name}: not uploaded ({reason}); {folder} is whole, upload it by "
            f"`hf upload {name} {folder}`"
        ) from None
    return str(repository)
