"""The software and hardware of a run: versions, device, host; recorded to explain differences between runs."""

import platform
import socket
from importlib.metadata import PackageNotFoundError, version

import torch

from trainer import __version__

_PACKAGES = ("accelerate", "deepspeed", "numpy", "webdataset")


def environment(device: torch.device) -> dict[str, str]:
    """This process's versions, device and host by name, for the journal."""
    found = {
        "trainer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed_version(name) or "not installed" for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "system": platform.platform(),
        "host": socket.gethostname(),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def installed_version(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
