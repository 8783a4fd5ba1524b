"""What the hardware could do, and what memory the run takes of it."""

import re
import time
from dataclasses import dataclass

import psutil
import torch

# Dense TFLOP/s (half of what is printed "with sparsity") by NVIDIA's data sheets: 16-bit (bf16 and fp16, accumulated in
# float32), TF32, FP32. The first whose words the device's name contains counts, so the special ones come first.
_DATA_SHEETS: list[tuple[str, dict[str, float]]] = [
    ("B200", {"16-bit": 2250.0, "tf32": 1125.0}),
    ("H200 NVL", {"16-bit": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H200", {"16-bit": 989.5, "tf32": 494.5, "fp32": 67.0}),
    ("H100 PCIe", {"16-bit": 756.0, "tf32": 378.0, "fp32": 51.0}),
    ("H100 NVL", {"16-bit": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H100", {"16-bit": 989.5, "tf32": 494.5, "fp32": 67.0}),
    ("A100", {"16-bit": 312.0, "tf32": 156.0, "fp32": 19.5}),
    ("L40S", {"16-bit": 362.0, "tf32": 183.0, "fp32": 91.6}),
    ("L4", {"16-bit": 121.0, "tf32": 60.0, "fp32": 30.3}),
]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most FLOP/s of a device in an arithmetic, and where the figure is from."""

    flops: float
    source: str


def device_peak(device: torch.device, precision: str) -> Peak:
    """By NVIDIA's data sheet where it is known, else of a matrix product that is timed now, which takes under a second.

    precision: as `train.precision` has it. That of float32 is TF32's where cuDNN may use it for convolutions.
    """
    arithmetic = "16-bit" if precision in ("bf16", "fp16") else "fp32"
    if arithmetic == "fp32" and _convolves_in_tf32():
        arithmetic = "tf32"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (teraflops := data_sheet(name, arithmetic)) is not None:
            return Peak(flops=teraflops * 1e12, source=f"data sheet of {name}, {arithmetic}, dense")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return Peak(flops=matmul_flops(device, dtype), source=f"a matrix product in {precision}, timed at the start")


def _convolves_in_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # missing from torch's stubs


def data_sheet(name: str, arithmetic: str) -> float | None:
    """TFLOP/s of a device by its name and "16-bit", "tf32" or "fp32"; None where it is not in the table."""
    figures = next((figures for known, figures in _DATA_SHEETS if re.search(rf"\b{known}\b", name)), {})
    return figures.get(arithmetic)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of five."""
    on_device = device.type == "cuda"
    side = 4096 if on_device else 512
    one, other = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms up, and is slower
        if on_device:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.matmul(one, other)
        if on_device:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def device_memory(device: torch.device) -> tuple[float, float]:
    """Most bytes that tensors took, and that torch held, since the last call: of a GPU; 0 on CPUs."""
    if device.type != "cuda":
        return 0.0, 0.0
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(allocated), float(reserved)


def host_memory() -> float:
    """Bytes of the host's memory that this process holds now (its resident set)."""
    return float(psutil.Process().memory_info().rss)
