"""What [data] asks for is what is trained on: mixtures, held-out images, bad samples, decoders."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data_harness import damage, image_of, with_mixture
from tests.harness import events, launch, load_config, logged, make_dataset, overrides
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.orders.order import GlobalOrder
from trainer.data.stream.bad_samples import BadSamples
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.data.training_data import open_training_data
from trainer.errors import ConfigError, DataError
from trainer.units import parse_size


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images of 8 x 8 in 15 shards, the first 21 the same as in `dataset`."""
    return make_dataset(tmp_path_factory.mktemp("other"), images=150)


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_a_mixture_has_its_proportions_and_every_dataset_its_epochs(
    config_path: Path, dataset: Path, other_dataset: Path, order: str
) -> None:
    config = load_config(with_mixture(config_path, **{str(dataset): 1, str(other_dataset): 3}), f"data.order={order}")
    data = open_training_data(config, index_folder=None)
    ids = data.order.ids(np.arange(4000))
    assert np.count_nonzero(ids < 21) == 1000
    others = ids[ids >= 21] - 21
    assert (np.sort(others.reshape(20, 150), axis=1) == np.arange(150)).all()
    assert len(data.dataset) == 171
    own = ShardedDataset(other_dataset)
    assert (image_of(data.dataset, 21 + 77) == image_of(own, 77)).all()
    assert data.dataset.describe(21 + 77) == own.describe(77)
    assert data.dataset.shards[data.dataset.shards_of([21 + 77])[0]] == own.shards[own.shards_of([77])[0]]


def test_a_mixture_trains_and_its_weights_are_what_the_run_is(
    config_path: Path, dataset: Path, other_dataset: Path, tmp_path: Path
) -> None:
    with_mixture(config_path, **{str(dataset): 0.5, str(other_dataset): 0.5})
    launch(2, "--config", str(config_path))
    assert len(logged(tmp_path / "run")) == 6
    config_path.write_text(config_path.read_text().replace("weight = 0.5", "weight = 0.7", 1))
    output = launch(1, "--config", str(config_path), *overrides(train__duration="8 steps"), expect=2)
    assert "data.mixture weights: [0.5, 0.5] in the checkpoint, [0.7, 0.5] now" in output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("path = 'x'\n[[data.mixture]]\npath = 'y'\nweight = 1.0", "data: should have either path or [[data.mixture]]"),
        ("", "data: should have either path or [[data.mixture]]"),
        ("order = 'lanes'\n[[data.mixture]]\npath = 'y'\nweight = 1.0", 'data: order = "lanes" is for one dataset'),
        ("[[data.mixture]]\npath = 'y'\nwieght = 1.0", "data.mixture[0].wieght: unknown key; did you mean weight?"),
        (
            "[[data.mixture]]\npath = 'x'\nweight = 1.0\n[[data.mixture]]\npath = 'y'\nweight = -1.0",
            "data.mixture[1].weight = -1.0: should be greater than 0",
        ),
        ("mixture = [3]", "data.mixture[0] = 3: should be a section: [[data.mixture]]"),
        ("path = 'x'\ncache_size = '12 parsecs'", "data.cache_size = '12 parsecs': a size is written like \"200 GB\""),
    ],
)
def test_wrong_settings_are_named(config_path: Path, lines: str, message: str) -> None:
    head, _, tail = config_path.read_text().partition("[data]")
    body = tail[tail.index("[model]") :]
    config_path.write_text(f"{head}[data]\nflip = true\n{lines}\n{body}")
    with pytest.raises(ConfigError) as caught:
        load_config(config_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(("channels", "grey"), [(3, ""), (1, " --mode L")])
@pytest.mark.parametrize("name", ["my photos", "photos.zip"])
def test_images_that_are_not_prepared_are_told_how_to_be(
    config_path: Path, tmp_path: Path, channels: int, grey: str, name: str
) -> None:
    source = tmp_path / name
    if name.endswith(".zip"):
        source.write_bytes(b"PK")
    else:
        (source / "@eaDir").mkdir(parents=True)
        (source / "@eaDir" / "0.jpg").touch()
        (source / "cats").mkdir()
        (source / "cats" / "1.jpg").touch()
    config = load_config(config_path, f"data.path={source}", f"model.channels={channels}")
    with pytest.raises(DataError) as caught:
        open_training_data(config, index_folder=None)
    holds = "is a file" if name.endswith(".zip") else "holds cats/1.jpg"
    out = tmp_path / f"{source.stem}-8"
    command = f"python -m data_prep {shlex.quote(str(source))} {shlex.quote(str(out))} --size 8{grey}"
    assert str(caught.value) == (
        f"{source}: {holds}, which is to be prepared first: `{command}`; then data.path = {str(out)!r}"
    )


def test_a_folder_of_something_else_and_a_glob_are_told(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for path, message in {
        "notes": "holds neither prepared data nor tars nor images",
        "*.tar": r"no such file or directory; for several tars give their folder, or \{000\.\.123\} for numbers",
    }.items():
        config = load_config(config_path, f"data.path={tmp_path / path}")
        with pytest.raises(DataError, match=message):
            open_training_data(config, index_folder=None)


def test_settings_that_do_not_fit_the_data_are_named(config_path: Path, dataset: Path, other_dataset: Path) -> None:
    for settings, message in {
        (
            "data.order=lanes",
            "data.lanes=3",
        ): r"data\.lanes = 3: must divide train\.global_batch; valid: \[1, 2, 4, 8\]",
        ("data.holdout=0.001",): r"data\.holdout = 0\.001: holds out 0 of 21 images",
        ("model.image_size=16", "model.attention_resolutions=[8]"): r"model\.image_size = 16: the images in .* have 8",
        ("model.channels=1",): r"model\.channels = 1: the images in .* have 3",
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_training_data(load_config(config_path, *settings), index_folder=None)
    too_rare = load_config(with_mixture(config_path, **{str(dataset): 1, str(other_dataset): 9999}))
    with pytest.raises(ConfigError, match=r"data\.mixture\.weight: a weight is less than a 1000th"):
        open_training_data(too_rare, index_folder=None)


def test_sizes_are_decimal() -> None:
    assert [parse_size(text) for text in ("200 GB", "1.5kB", "7 B", 12)] == [200 * 10**9, 1500, 7, 12]


@pytest.mark.parametrize("order", ["global", "windowed", "lanes"])
def test_held_out_images_are_never_trained_on(config_path: Path, other_dataset: Path, order: str) -> None:
    settings = [f"data.path={other_dataset}", f"data.order={order}", "data.window=3"]
    data = open_training_data(load_config(config_path, *settings, "data.holdout=0.2"), index_folder=None)
    assert 15 <= len(data.held_out) <= 45
    assert data.order.samples == 150 - len(data.held_out)
    epochs = data.order.ids(np.arange(4 * data.order.samples)).reshape(4, -1)
    kept = np.setdiff1d(np.arange(150), data.held_out)
    assert (np.sort(epochs, axis=1) == kept).all()
    more = open_training_data(load_config(config_path, *settings, "data.holdout=0.4"), index_folder=None)
    assert set(data.held_out) < set(more.held_out)


def test_an_image_is_on_one_side_wherever_it_lies(config_path: Path, dataset: Path, other_dataset: Path) -> None:
    """The 21 images are also among the 150, in other shards, and under another seed."""
    held_out = []
    for path, seed in ((dataset, 3), (other_dataset, 4)):
        config = load_config(config_path, f"data.path={path}", "data.holdout=0.3", f"seed={seed}")
        held_out.append(open_training_data(config, index_folder=None).held_out)
    assert held_out[0].tolist() == [n for n in held_out[1].tolist() if n < 21]
    assert len(held_out[0])


def test_another_held_out_split_is_another_run(config_path: Path) -> None:
    launch(1, "--config", str(config_path), *overrides(data__holdout=0.3))
    output = launch(1, "--config", str(config_path), *overrides(train__duration="8 steps"), expect=2)
    assert "data.holdout: 0.3 in the checkpoint, 0.0 now" in output


def skipping_stream(folder: Path, *, world_size: int, workers: int, limit: int = 100) -> tuple[list[Any], list[str]]:
    """(position, id) of 7 steps of 8 over all ranks, and what was reported."""
    dataset, told = ShardedDataset(folder), []
    layout = BatchLayout.plan(8, world_size, None)
    seen = []
    for rank in range(world_size):
        plan = MicroBatchPlan(layout, order=GlobalOrder(21, 3), rank=rank, first_step=0, last_step=7)
        bad = BadSamples(limit, told.append)
        for batch in micro_batches(dataset, plan, workers=workers, prefetch=1, pin_memory=False, bad_samples=bad):
            assert batch.keys() == {"position", "id", "image"}
            assert all(
                (image.numpy() == image_of(dataset, number)).all()
                for image, number in zip(batch["image"], batch["id"].tolist())
            )
            seen += zip(batch["position"].tolist(), batch["id"].tolist())
    return sorted(seen), told


def test_bad_samples_are_replaced_alike_by_any_number_of_ranks_and_workers(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    planned = GlobalOrder(21, 3).ids(np.arange(200)).tolist()
    bad = {planned[5], planned[6], planned[7], planned[15]}  # three in a row, so the next one is not enough
    damage(copy, *bad)
    expected = []
    for position in range(56):
        later = position
        while planned[later] in bad:
            later += 1
        expected.append((position, planned[later]))
    for world_size, workers in ((1, 0), (1, 2), (2, 1), (4, 0)):
        seen, told = skipping_stream(copy, world_size=world_size, workers=workers)
        assert seen == expected
        assert {int(fault.partition("(sample ")[2].partition(")")[0]) for fault in told} == bad
        if world_size == 1:
            assert len(told) == 4  # once each, though they came two or three times


def test_too_many_bad_samples_end_the_run(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    damage(copy, 4, 11, 12)
    with pytest.raises(DataError, match=r"crc32 differs.*; damaged samples exceed data\.max_bad_samples = 2$"):
        skipping_stream(copy, world_size=1, workers=1, limit=2)
    damage(copy, *set(range(21)) - {4, 11, 12})
    with pytest.raises(DataError, match="nor is one of the 63 whole that follow in the order"):
        skipping_stream(copy, world_size=1, workers=0)


def test_a_lost_shard_is_no_bad_sample(dataset: Path, tmp_path: Path) -> None:
    """To skip would be to train on a part of the data and call it the whole."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    layout = BatchLayout.plan(8, 1, None)
    plan = MicroBatchPlan(layout, order=GlobalOrder(21, 3), rank=0, first_step=0, last_step=7)
    opened = ShardedDataset(copy)
    (copy / "shard-000001.tar").unlink()
    bad = BadSamples(100, pytest.fail)
    stream = micro_batches(opened, plan, workers=1, prefetch=1, pin_memory=False, bad_samples=bad)
    with pytest.raises(DataError, match=r"shard-000001\.tar: cannot be opened \(No such file"):
        list(stream)


def test_a_run_that_skips_goes_to_its_end_and_names_what_it_skipped(
    dataset: Path, tmp_path: Path, config_path: Path
) -> None:
    """By default it stops; told to skip, it resumes, for that is no other run."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    damage(copy, 4, 11)
    settings = overrides(data__path=copy)
    output = launch(1, "--config", str(config_path), *settings, expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "(sample " in line
    assert "crc32 differs" in line
    launch(2, "--config", str(config_path), *settings, *overrides(data__on_bad_sample="skip"))
    run = tmp_path / "run"
    journals = [json.loads(line) for path in run.glob("events*.jsonl") for line in path.read_text().splitlines()]
    named = {event["sample"] for event in journals if event["event"] == "bad_sample"}
    assert {name.partition("(sample ")[2].partition(")")[0] for name in named} == {"4", "11"}
    assert events(run)[-1]["event"] == "finished"


def test_batches_are_channels_last_as_decoders_write_them(dataset: Path) -> None:
    plan = MicroBatchPlan(BatchLayout.plan(8, 1, None), order=GlobalOrder(21, 3), rank=0, first_step=0, last_step=1)
    for workers in (0, 1):
        (batch,) = micro_batches(ShardedDataset(dataset), plan, workers=workers, prefetch=1, pin_memory=False)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
