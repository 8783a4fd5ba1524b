"""Tensors cut in any way by those who write them are read in any other."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.engine.state.tensor_files import SavedSlice, TensorReader, row_by_row_copy
from trainer.errors import CheckpointError

SHAPES = {"a": torch.Size([7, 3, 2]), "b": torch.Size([5]), "c": torch.Size([])}


def write(folder: Path, parts: int, rng: random.Random) -> tuple[list[Path], dict[str, torch.Tensor]]:
    """Each tensor cut at random into as many slices as there are files."""
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    files: list[list[SavedSlice]] = [[] for _ in range(parts)]
    for name, tensor in tensors.items():
        cuts = sorted(rng.choices(range(tensor.numel() + 1), k=parts - 1))
        for file, (start, stop) in zip(files, zip([0, *cuts], [*cuts, tensor.numel()])):
            if stop > start:
                file.append(SavedSlice(name, tensor.shape, start, tensor.reshape(-1)[start:stop]))
    paths = []
    for number, slices in enumerate(files):
        paths.append(folder / f"{number}.safetensors")
        save_file(row_by_row_copy(slices), paths[-1])
    return paths, tensors


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_any_range_is_read_from_any_cut(tmp_path: Path, parts: int) -> None:
    rng = random.Random(parts)
    paths, tensors = write(tmp_path, parts, rng)
    reader = TensorReader(paths, SHAPES)
    for name, tensor in tensors.items():
        assert torch.equal(reader.whole(name), tensor)
        for _ in range(50):
            start, stop = sorted(rng.choices(range(tensor.numel() + 1), k=2))
            assert torch.equal(reader.read(name, start, stop), tensor.reshape(-1)[start:stop])


def test_what_is_in_channels_last_memory_is_stored_row_by_row() -> None:
    tensor = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    (copy,) = row_by_row_copy([SavedSlice("w", tensor.shape, 0, tensor)]).values()
    assert copy.is_contiguous()
    assert torch.equal(copy, tensor)


def test_a_whole_tensor_is_stored_as_any_program_reads_it() -> None:
    flat = torch.arange(6.0)
    (copy,) = row_by_row_copy([SavedSlice("w", torch.Size([2, 3]), 0, flat)]).values()
    assert torch.equal(copy, flat.view(2, 3))


@pytest.mark.parametrize(
    ("slices", "fault"),
    [
        ([(0, 4), (5, 6)], r"w: 0:4, 5:6 of 6 elements are there"),
        ([(0, 4), (3, 6)], r"w: 0:4, 3:6 of 6"),
        ([(0, 4)], r"w: 0:4 of 6"),
        ([], r"w: nothing of 6"),
    ],
)
def test_a_gap_or_an_overlap_is_found(tmp_path: Path, slices: list[tuple[int, int]], fault: str) -> None:
    values = torch.arange(6.0)
    paths = []
    for number, (start, stop) in enumerate(slices):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(row_by_row_copy([SavedSlice("w", torch.Size([6]), start, values[start:stop])]), paths[-1])
    with pytest.raises(CheckpointError, match=fault):
        TensorReader(paths, {"w": torch.Size([6])})


def test_a_tensor_that_nobody_promised_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2), "v": torch.zeros(2)}, tmp_path / "0.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.safetensors: holds v, which the manifest does not know"):
        TensorReader([tmp_path / "0.safetensors"], {"w": torch.Size([2])})
