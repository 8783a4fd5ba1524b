"""Samples are what webdataset says: what `data.cond` names goes from the shards to the batch, and nothing else does."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from tests.data_harness import damage, encoded, images_of, pixels, write_tar
from tests.data_prep_harness import data_prep
from tests.harness import load_config, write_config
from tests.yesterday import FOLDER
from trainer.config import Config
from trainer.data.datasets.dataset import MEMBER_OF
from trainer.data.datasets.indexed import IndexedDataset
from trainer.data.datasets.joined import JoinedDatasets
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.images import from_uint8, read_images
from trainer.data.orders.order import GlobalOrder
from trainer.data.stream.bad_samples import BadSamples
from trainer.data.stream.batches import as_tensors, read_batch, stacked
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, StartMethod, micro_batches
from trainer.data.training_data import open_training_data
from trainer.diffusion.keyed_noise import keyed_flips
from trainer.engine.network.build import build_network
from trainer.engine.run_folder import check_identity
from trainer.engine.step.train_step import conditioning, device_batch
from trainer.errors import CheckpointError, ConfigError, DataError, SampleError
from trainer.models.backbones import BACKBONES, Backbone
from trainer.models.ddpm_unet import UNet

COUNT, BATCH, SEED = 12, 4, 3
ALL = tuple(MEMBER_OF)
LACKING = 5  # has its image alone


def array_of(n: int) -> np.ndarray:
    return np.arange(6, dtype=">f8").reshape(2, 3) + n


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of four samples as webdataset writes them, in tars/, and what data_prep makes of them, in shards/."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "tars").mkdir()
    for shard in range(3):
        with wds.TarWriter(str(folder / "tars" / f"{shard}.tar")) as writer:
            for n in range(4 * shard, 4 * shard + 4):
                low, source = (encoded(pixels(100 * k + n, side, side)) for k, side in ((1, 4), (2, 8)))
                further = {"cls": n % 3, "txt": f"ein Öl {n}", "npy": array_of(n), "low.png": low, "source.png": source}
                writer.write({"__key__": f"{n:02d}", "png": encoded(pixels(n)), **(further if n != LACKING else {})})
    options = ["--size", 8, "--workers", 1, "--shard-samples", 4]
    assert data_prep(folder / "tars", folder / "shards", *options) == 0
    return folder


def settings(folder: Path, kind: str, *cond: str, **more: str) -> Config:
    """The configuration of a run on folder/kind."""
    fields = [f"data.{name}={value}" for name, value in more.items()]
    path = write_config(folder, folder / kind, kind)
    return load_config(path, f"data.cond={list(cond)}".replace("'", '"'), *fields)


def opened(folder: Path, kind: str, *cond: str, **more: str) -> Any:
    return open_training_data(settings(folder, kind, *cond, **more), index_folder=None).dataset


def stream(dataset: Any, workers: int, *, start: StartMethod = "fork", **options: Any) -> list[dict[str, Any]]:
    plan = MicroBatchPlan(
        BatchLayout.plan(BATCH, 1, None), order=GlobalOrder(COUNT, SEED), rank=0, first_step=0, last_step=3
    )
    return list(
        micro_batches(dataset, plan, workers=workers, prefetch=1, pin_memory=False, start_method=start, **options)
    )


def skipping(dataset: Any, workers: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    told: list[str] = []
    return stream(dataset, workers, bad_samples=BadSamples(100, told.append)), told


def images(values: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(values)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["shards", "tars"])
@pytest.mark.parametrize(("workers", "start"), [(0, "fork"), (2, "fork"), (1, "spawn")])
def test_what_is_asked_for_comes_with_its_image(folder: Path, kind: str, workers: int, start: StartMethod) -> None:
    """From data_prep's shards and from plain tars alike; the stream that skips the sample that has nothing."""
    told: list[str] = []
    batches = stream(opened(folder, kind, *ALL), workers, start=start, bad_samples=BadSamples(9, told.append))
    assert len(told) == 1
    for batch in batches:
        ids = batch["id"].tolist()
        assert LACKING not in ids
        assert batch.keys() == {"position", "id", "image", *ALL}
        assert torch.equal(batch["image"], images([pixels(n) for n in ids]))
        assert torch.equal(batch["low_res"], images([pixels(100 + n, 4, 4) for n in ids]))
        assert torch.equal(batch["source"], images([pixels(200 + n) for n in ids]))
        assert torch.equal(batch["array"], torch.stack([torch.tensor(array_of(n).astype(float)) for n in ids]))
        assert torch.equal(batch["label"], torch.tensor([n % 3 for n in ids]))
        assert batch["caption"] == [f"ein Öl {n}" for n in ids]


@pytest.mark.parametrize("kind", ["shards", "tars"])
@pytest.mark.parametrize(("cond", "reads"), [((), 1), (("label",), 1), (("caption",), 2), (("low_res", "array"), 3)])
def test_only_what_is_asked_for_is_read(
    folder: Path, kind: str, cond: tuple[str, ...], reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(folder, kind, *cond)
    calls, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *place: calls.append(place) or pread(*place))
    batch = read_batch(dataset, (range(4), range(4)))
    assert batch.keys() == {"position", "id", "image", "faults", *cond}
    assert len(calls) == 4 * reads


@pytest.mark.parametrize("kind", ["shards", "tars"])
@pytest.mark.parametrize("name", ALL)
def test_a_sample_without_it_is_one_line_or_is_skipped(folder: Path, kind: str, name: str) -> None:
    dataset = opened(folder, kind, name)
    member = {"shards": "shard-000001.tar: member 000000005", "tars": "1.tar: member 05.png"}[kind]
    with pytest.raises(DataError, match=rf"/{member}.* \(sample 5\): {name}: the sample has none$") as raised:
        stream(dataset, workers=1)
    assert "\n" not in str(raised.value)
    batches, told = skipping(dataset)
    assert [str(raised.value)] == told
    order = GlobalOrder(COUNT, SEED).ids(np.arange(4 * COUNT)).tolist()
    expected = [next(n for n in order[position:] if n != LACKING) for position in range(COUNT)]
    assert [sample for batch in batches for sample in batch["id"].tolist()] == expected


@pytest.mark.parametrize(("name", "member"), [("caption", "txt"), ("array", "npy"), ("low_res", "low")])
def test_a_damaged_member_counts_as_a_damaged_sample(folder: Path, tmp_path: Path, name: str, member: str) -> None:
    copy = Path(shutil.copytree(folder / "shards", tmp_path / "shards"))
    with (copy / "shard-000000.tar").open("r+b") as shard:
        shard.seek(int(ShardedDataset(copy).index[2][member]["offset"]))
        shard.write(b"\xff")
    dataset = ShardedDataset(copy, cond=(name,))
    with pytest.raises(SampleError, match=rf"000000002.* {name}: damaged \(crc32 differs\)"):
        dataset.further(2)
    dataset.cond = ()
    assert skipping(dataset)[1] == []  # a dataset opened without it reads only images
    damage(copy, 3)
    assert len(skipping(dataset)[1]) == 1


def test_members_that_are_none_are_told(tmp_path: Path) -> None:
    """In tars without checksums the content decides."""
    (tmp_path / "tars").mkdir()
    with wds.TarWriter(str(tmp_path / "tars" / "0.tar")) as writer:
        for n, data in enumerate([b"\xff\xfe", b"ok"]):
            writer.write({"__key__": str(n), "png": encoded(pixels(n)), "txt": data, "npy": b"no", "low.png": b"no"})
    for name, message in (("caption", "cannot be decoded"), ("array", "is no array"), ("low_res", "cannot be decoded")):
        with pytest.raises(SampleError, match=rf"member 0\.png.*: {name}: {message}"):
            opened(tmp_path, "tars", name).further(0)


def test_second_images_of_different_sides_make_no_batch(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with wds.TarWriter(str(tmp_path / "tars" / "0.tar")) as writer:
        for n in range(2):
            low = encoded(pixels(n, 4 + n, 4 + n))
            writer.write({"__key__": str(n), "png": encoded(pixels(n)), "low.png": low})
    with pytest.raises(
        DataError, match=r"data\.cond = low_res: the samples of a batch have different shapes: \(4, 4, "
    ):
        read_batch(opened(tmp_path, "tars", "low_res"), (range(2), range(2)))


def test_on_the_device_images_are_scaled_and_mirrored_together(folder: Path) -> None:
    config = settings(folder, "shards", *ALL)
    assert config.data.flip
    batch = read_batch(opened(folder, "shards", *ALL), (range(8), [0, 1, 2, 3] * 2))
    found = device_batch(batch, config, torch.device("cpu"))
    assert found.cond.keys() == {"label", "low_res", "source", "array"}  # captions wait for a tokeniser
    flips = keyed_flips(SEED, found.position).tolist()
    assert 0 < sum(flips) < 8
    for name, tensor in {"image": found.x, **found.cond}.items():
        if name in ("image", "low_res", "source"):
            expected = [x.flip(-1) if flip else x for x, flip in zip(from_uint8(batch[name]), flips)]
            assert torch.equal(tensor, torch.stack(expected)), name
        else:
            assert torch.equal(tensor, batch[name]), name


def test_datasets_of_a_mixture_give_their_own(folder: Path) -> None:
    parts = [opened(folder, kind, "label", "caption") for kind in ("tars", "shards")]
    assert all(isinstance(part, IndexedDataset) for part in parts)
    joined = JoinedDatasets(parts)
    assert joined.cond == ("label", "caption")
    assert joined.further(COUNT + 4) == joined.further(4) == {"label": 1, "caption": "ein Öl 4"}
    assert joined.key(COUNT + 4) == "000000004"


def test_what_no_sample_has_or_no_network_takes_is_one_line(folder: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", images_of(2))
    for name in ALL:
        with pytest.raises(ConfigError, match=rf"^data\.cond = \['{name}'\]: no sample in .* has a {name}$"):
            opened(tmp_path, "tars", name)
    with pytest.raises(ConfigError, match=r"data\.cond = \['caption'\]: no sample in .* has a caption$"):
        ShardedDataset(dataset, cond=("caption",))
    with pytest.raises(ConfigError, match=r"^data\.cond = \['label'\]: no sample in .* has a label$"):
        ShardedDataset(FOLDER / "data", cond=("label",))
    with pytest.raises(ConfigError, match=r"^data\.cond = \['label'\]: the network takes no label; leave it out$"):
        build_network(settings(folder, "shards", "label"))
    for wrong, message in ((["labels"], "'label'"), (["label", "label"], "cond should name each once")):
        with pytest.raises(ConfigError, match=message):
            settings(folder, "shards", *wrong)


def test_it_is_part_of_what_a_run_is_and_none_is_what_it_was(folder: Path) -> None:
    plain, labelled = (
        open_training_data(settings(folder, "shards", *cond), index_folder=None).identity for cond in ((), ("label",))
    )
    earlier = {name: value for name, value in plain.items() if name != "data.cond"}
    check_identity(earlier, plain, "checkpoint")
    for saved in (earlier, plain):
        with pytest.raises(CheckpointError, match=r"data\.cond: \[\] in the checkpoint, \['label'\] now"):
            check_identity(saved, labelled, "checkpoint")


def test_an_index_of_tars_is_kept_for_each_choice_of_members(folder: Path, tmp_path: Path) -> None:
    for cond in ((), ("caption",), (), ("caption", "low_res")):
        config = settings(folder, "tars", *cond)
        dataset = open_training_data(config, index_folder=tmp_path).dataset
        assert dataset.further(0).keys() == set(cond)
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_held_out_samples_come_with_what_is_asked_for(folder: Path) -> None:
    config = settings(folder, "shards", "label", "low_res", on_bad_sample="skip")
    dataset = open_training_data(config, index_folder=None).dataset
    found, further, kept = read_images(dataset, [4, LACKING, 7], skip_damaged=True)
    assert (len(found), kept) == (2, [4, 7])
    cond = conditioning(as_tensors(stacked(further)), config, torch.device("cpu"))
    assert cond["label"].tolist() == [1, 1]
    assert torch.equal(cond["low_res"], from_uint8(images([pixels(100 + n, 4, 4) for n in kept])))


def test_a_network_that_takes_more_than_images_must_be_given_it(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = Backbone(build=UNet, conditioning=lambda _, samples: {"label": torch.zeros(samples, dtype=torch.int64)})
    monkeypatch.setitem(BACKBONES, "ddpm-unet", labelled)
    config = write_config(tmp_path, dataset)
    with pytest.raises(ConfigError, match=r"data.cond = \[\]: the network takes label; add it"):
        build_network(load_config(config))
    build_network(load_config(config, 'data.cond=["label"]'))


def test_tars_have_images_of_one_channel_or_three(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", images_of(3))
    config = load_config(write_config(tmp_path, tmp_path), "model.channels=4")
    with pytest.raises(ConfigError, match=r"model.channels = 4: images in .* have 1 or 3"):
        open_training_data(config, index_folder=None)


def test_stored_images_of_another_side_are_refused(folder: Path, tmp_path: Path) -> None:
    """4 x 4 ones, for a network that enlarges others."""
    config = write_config(tmp_path, folder / "shards")
    network = ["model.kind=adm-unet", "model.heads=2", 'data.cond=["low_res"]', "data.flip=false"]
    assert open_training_data(load_config(config, *network, "model.low_res_size=4"), index_folder=None).dataset.cond
    with pytest.raises(ConfigError, match=r"^model\.low_res_size = 2: the low_res images in .*/shards have 4$"):
        open_training_data(load_config(config, *network, "model.low_res_size=2"), index_folder=None)
