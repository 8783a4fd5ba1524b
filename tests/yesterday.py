"""Runs that an earlier version wrote (tests/fixtures/yesterday), and what that version made of them when it went on."""

import functools
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness import REPOSITORY, environment, free_port, overrides, tensors_of

FOLDER = Path(__file__).parent / "fixtures" / "yesterday"
_THREADS = 2  # of all processes together, when expected.json was made: sums over threads round by their number
# Kernels that every x86 processor has: others round differently. So does oneDNN by the sizes of the processor's caches.
PORTABLE_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
_WITHOUT_ONEDNN = "import runpy, sys, torch; torch.backends.mkldnn.enabled = False; sys.argv = sys.argv[1:]; "
_TRAIN = _WITHOUT_ONEDNN + "runpy.run_path(sys.argv[0], run_name='__main__')"
# What training computes with, by torch alone: convolutions, products, normalisation, softmax, transcendental functions.
_PROBE = (
    _WITHOUT_ONEDNN
    + """
import hashlib
torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.randn(2, 8, 8, 8, requires_grad=True)
weights = [torch.randn(8, 8, 3, 3, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
h = torch.nn.functional.silu(torch.nn.functional.group_norm(x.contiguous(memory_format=torch.channels_last), 2))
h = torch.nn.functional.conv2d(h, weights[0], padding=1).flatten(2) @ torch.randn(64, 8)
h = torch.softmax(h @ weights[1], dim=-1) + torch.sin(h).log1p().nan_to_num() + torch.exp(-h.square())
h.square().mean().backward()
numbers = [x.grad, *(weight.grad for weight in weights)]
numbers += [n.square().mul(0.001).sqrt().add(1e-8).reciprocal() for n in numbers]
print(hashlib.sha256(b"".join(n.contiguous().numpy().tobytes() for n in numbers)).hexdigest())
"""
)


def copy_run(name: str, folder: Path) -> tuple[Path, list[str]]:
    """A copy of an earlier run, and the arguments that train.py is to go on with it."""
    run = Path(shutil.copytree(FOLDER / name, folder / name))
    paths = overrides(run_dir=run, data__path=FOLDER / "data")
    return run, ["--config", str(run / "config.toml"), *paths]


def go_on(name: str, folder: Path, *, processes: int, strategy: str) -> Path:
    """The earlier run, which has ten steps, trained to step 20."""
    run, arguments = copy_run(name, folder)
    command = [sys.executable, "-c", _TRAIN, "trainer/train.py", *arguments]
    command += overrides(train__duration="20 steps", train__strategy=strategy)
    port = str(free_port())
    ranks = []
    for rank in map(str, range(processes)):
        place = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        if processes > 1:
            place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # Processes of their own, not forks of the harness's server: kernels are chosen once a process.
        variables = environment(**place, **PORTABLE_KERNELS, OMP_NUM_THREADS=str(_THREADS // processes))
        ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=variables))
    assert [process.wait(timeout=240) for process in ranks] == [0] * processes
    return run


@functools.cache
def rounding() -> str:
    """A digest of what torch alone computes in the way of `go_on`: the same where the processor rounds the same."""
    command = [sys.executable, "-c", _PROBE, "probe"]
    environ = environment(**PORTABLE_KERNELS)
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip()


def digest(run: Path, step: int) -> dict[str, str]:
    """sha256 of all tensors of each kind (model, ema, optimizer.exp_avg, ...) in a checkpoint."""
    hashes: dict[str, Any] = {}
    for name, tensor in sorted(tensors_of(run, step).items()):
        of_kind = hashes.setdefault(name.partition("/")[0], hashlib.sha256())
        of_kind.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {kind: of_kind.hexdigest() for kind, of_kind in hashes.items()}


def norms(run: Path, step: int) -> dict[str, float]:
    """Euclidean norm of all tensors of each kind, in float64."""
    squares: dict[str, float] = {}
    for name, tensor in tensors_of(run, step).items():
        kind = name.partition("/")[0]
        squares[kind] = squares.get(kind, 0.0) + tensor.double().square().sum().item()
    return {kind: square**0.5 for kind, square in squares.items()}
