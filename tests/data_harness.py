"""What the tests of the stream share: images in tars, mixtures, damage, and streaming by several ranks."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data_prep_harness import packed
from tests.harness import REPOSITORY, environment, free_port, launch
from tests.stream_ranks import Way, digest
from trainer.data.datasets.dataset import Dataset
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.stream.batches import read_batch
from trainer.data.training_data import open_training_data


def image_of(dataset: Dataset, sample: int) -> np.ndarray:
    """(C, H, W), as a batch has it."""
    image: np.ndarray = read_batch(dataset, ([0], [sample]))["image"][0].numpy()
    return image


def pixels(number: int, width: int = 8, height: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes], *, form: int = tarfile.USTAR_FORMAT) -> Path:
    return packed(path, members, form=form)


def images_of(count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{n:04d}.png": encoded(pixels(n)) for n in range(first, first + count)}


def with_mixture(config_path: Path, **weights: float) -> Path:
    """The configuration with a mixture in the place of data.path."""
    entries = "".join(f'[[data.mixture]]\npath = "{path}"\nweight = {weight}\n' for path, weight in weights.items())
    lines = [line for line in config_path.read_text().splitlines() if not line.startswith("path =")]
    config_path.write_text("\n".join([*lines, entries]))
    return config_path


def damage(folder: Path, *samples: int) -> Path:
    """Flip a bit in each of these."""
    dataset = ShardedDataset(folder)
    for sample in samples:
        with Path(dataset.shards[int(dataset.shards_of(sample))].url).open("r+b") as stream:
            stream.seek(int(dataset.index[sample]["offset"]) + 20)
            byte = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes([byte ^ 4]))
    return folder


def streamed(processes: int, config: Path, *ways: str) -> list[list[tuple[int, int, str]]]:
    """For each way, what all ranks saw: position, id and digest of the image, by position."""
    return seen(launch(processes, str(config), *ways, script="tests.stream_ranks"), ways)


def streamed_under_torchrun(processes: int, config: Path, *ways: str, **extra: str) -> list[list[tuple[int, int, str]]]:
    """The same, by a real launcher, with `extra` in its environment."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "-m", "tests.stream_ranks", str(config), *ways]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(**extra), timeout=3500, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return seen(done.stdout, ways)


def seen(output: str, ways: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """What rank 0 of `tests.stream_ranks` printed."""
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"way"')]
    assert [one["way"] for one in found] == list(ways)
    return [[tuple(sample) for sample in one["samples"]] for one in found]


def expected(config: Path, way: str, *, bad: frozenset[int] = frozenset()) -> list[tuple[int, int, str]]:
    """What one process without loaders sees that asks the order; of damaged samples the next whole ones."""
    parsed = Way.parse(way)
    loaded = parsed.config(config)
    data = open_training_data(loaded, index_folder=None)
    batch = loaded.train.global_batch
    seen = []
    for position in range(parsed.first * batch, parsed.last * batch):
        sample = next(sample for sample in data.order.ids(np.arange(position, position + 64)) if sample not in bad)
        seen.append((position, int(sample), digest(image_of(data.dataset, int(sample)))))
    return seen
