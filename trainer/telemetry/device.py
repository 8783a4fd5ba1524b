"""Peak performance of devices, and memory use."""

import re
import time
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch


class DataSheet(NamedTuple):
    """A GPU by NVIDIA's data sheet: memory in GB, of the largest variant, and dense TFLOP/s (half of the figure "with
    sparsity") by arithmetic: "16-bit" is bf16 and fp16, "fp16" that alone, both with float32 accumulation.
    """

    name: str
    memory: int
    teraflops: dict[str, float]


# The first entry whose words are all in a device's name applies, so specific names come first.
_DATA_SHEETS = [
    DataSheet("B200", 180, {"16-bit": 2250.0, "tf32": 1125.0}),
    DataSheet("H200 NVL", 141, {"16-bit": 835.5, "tf32": 417.5, "fp32": 60.0}),
    DataSheet("H200", 141, {"16-bit": 989.5, "tf32": 494.5, "fp32": 67.0}),
    DataSheet("H100 PCIe", 80, {"16-bit": 756.0, "tf32": 378.0, "fp32": 51.0}),
    DataSheet("H100 NVL", 94, {"16-bit": 835.5, "tf32": 417.5, "fp32": 60.0}),
    DataSheet("H100", 80, {"16-bit": 989.5, "tf32": 494.5, "fp32": 67.0}),
    DataSheet("A100", 80, {"16-bit": 312.0, "tf32": 156.0, "fp32": 19.5}),
    DataSheet("L40S", 48, {"16-bit": 362.0, "tf32": 183.0, "fp32": 91.6}),
    DataSheet("L4", 24, {"16-bit": 121.0, "tf32": 60.0, "fp32": 30.3}),
    DataSheet("A10", 24, {"16-bit": 125.0, "tf32": 62.5, "fp32": 31.2}),
    DataSheet("RTX 4090", 24, {"16-bit": 165.2, "tf32": 82.6, "fp32": 82.6}),
    DataSheet("RTX 3090", 24, {"16-bit": 71.0, "tf32": 35.6, "fp32": 35.6}),
    DataSheet("V100-PCIE", 32, {"fp16": 112.0, "fp32": 14.0}),
    DataSheet("V100", 32, {"fp16": 125.0, "fp32": 15.7}),
    DataSheet("T4", 16, {"fp16": 65.0, "fp32": 8.1}),
]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak FLOP/s of a device for a precision, and the source of the figure."""

    flops: float
    source: str


def device_peak(device: torch.device, precision: str) -> Peak:
    """From NVIDIA's data sheet where the device is in the table, otherwise measured on a matrix product in under a
    second.

    precision: as in `train.precision`. For float32 it is the peak of TF32 where cuDNN may use that for convolutions.
    """
    arithmetic = "tf32" if precision in ("fp32", "tf32") and _convolves_in_tf32() else precision
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        sheet = data_sheet(name)
        if sheet is not None and (teraflops := peak_teraflops(sheet, arithmetic)) is not None:
            return Peak(flops=teraflops * 1e12, source=f"data sheet of {name}, {arithmetic}, dense")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return Peak(flops=matmul_flops(device, dtype), source=f"a matrix product in {precision}, timed at the start")


def _convolves_in_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # missing from torch's stubs


def data_sheet(name: str) -> DataSheet | None:
    """Data sheet of a device by its CUDA name; None where it is not in the table."""
    return next((sheet for sheet in _DATA_SHEETS if re.search(rf"\b{sheet.name}\b", name)), None)


def data_sheet_of(short: str) -> DataSheet | None:
    """Data sheet of a device by its short name, "h100" or "rtx-4090"; None where it is not in the table."""
    return next((sheet for sheet in _DATA_SHEETS if _in_short(sheet.name) == _in_short(short)), None)


def known_devices() -> list[str]:
    """Short names that `data_sheet_of` accepts."""
    return [sheet.name for sheet in _DATA_SHEETS]


def _in_short(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def peak_teraflops(sheet: DataSheet, arithmetic: str) -> float | None:
    """Dense TFLOP/s in "bf16", "fp16", "tf32" or "fp32"; None where unsupported or not in the sheet."""
    either = sheet.teraflops.get("16-bit") if arithmetic in ("bf16", "fp16") else None
    return sheet.teraflops.get(arithmetic, either)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of five."""
    on_device = device.type == "cuda"
    side = 4096 if on_device else 512
    one, other = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first is a warm-up
        if on_device:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.matmul(one, other)
        if on_device:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def device_memory(device: torch.device) -> tuple[float, float]:
    """Peak bytes of tensors, and of memory reserved by torch, on a GPU since the last call; 0 on CPUs."""
    if device.type != "cuda":
        return 0.0, 0.0
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(allocated), float(reserved)


def host_memory() -> float:
    """Resident set size of this process, in bytes."""
    return float(psutil.Process().memory_info().rss)
