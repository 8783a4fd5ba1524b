"""Files of weights as their authors published them: where they are downloaded to, and whether a file is one of them."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """The weights of the network that people call `network`; `file`: their name in PyTorch Hub's folder."""

    network: str
    url: str
    file: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where the file lies once it has been downloaded: PyTorch Hub's folder."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file

    def download(self) -> None:
        """Fetch the file, if it is not there yet. Raises ConfigError that names another way where that fails."""
        if self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            progress = sys.stderr.isatty()
            torch.hub.download_url_to_file(self.url, str(self.path), hash_prefix=self.sha256, progress=progress)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{self.url}: cannot be downloaded ({error}); bring it to this machine and name it with "
                "--feature-weights, or take --features efficientnet-lite0, which needs no download"
            ) from error

    def check(self, weights: Path, *, unchecked: bool) -> str:
        """The sha256 of the file. Raises ConfigError where it cannot be read, or is not the published one and not to be
        taken `unchecked`.
        """
        try:
            with weights.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ConfigError(f"--feature-weights {weights}: cannot be read ({error.strerror})") from error
        if digest != self.sha256 and not unchecked:
            raise ConfigError(
                f"{weights}: its sha256 is {digest}, the published {self.network} weights have {self.sha256}; numbers "
                "by others compare with nothing: --feature-weights-unchecked takes them all the same"
            )
        return digest

    def name(self, digest: str) -> str:
        """What a network with weights of this sha256 is called."""
        return self.network if digest == self.sha256 else f"{self.network} with unchecked weights"


def read_tensors(weights: Path) -> dict[str, Any]:
    """The tensors of a file by their names; no pickle of it is executed."""
    tensors: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
    return tensors


@contextmanager
def weights_of(network: str, weights: Path) -> Iterator[None]:
    """Raise ConfigError where what the file holds turns out not to be weights of this network."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError, EOFError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--feature-weights {weights}: no weights of {network} ({reason})") from error
