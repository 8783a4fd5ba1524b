"""Classes in training: labels dropped by position, embedded, refused where they cannot be."""

from pathlib import Path

import pytest
import torch
import webdataset as wds

from tests.data_harness import encoded, pixels
from tests.harness import (
    load_config,
    overrides,
    unet_section,
    write_config,
)
from tests.labelled import CLASSES, CONDITIONAL, KINDS, prepare
from trainer.config.backbones import DDPMUNetConfig, class_conditional
from trainer.config.sections import MixtureEntry
from trainer.data.training_data import open_training_data
from trainer.diffusion.label_drop import drop_labels
from trainer.engine.build import build_network
from trainer.engine.step.train_step import conditioning, device_batch
from trainer.errors import ConfigError, ConversionError, DataError
from trainer.interop.diffusers_settings import unet_settings
from trainer.models.backbones import example_inputs
from trainer.models.ddpm_unet import UNet

SMALL = unet_section(image_size=8, base_channels=32, channel_multipliers=[1], attention_resolutions=[])


def tars(folder: Path, labels: list[int | None]) -> Path:
    """A tar as webdataset writes it, with a sample for each label; None: without one."""
    folder.mkdir(parents=True)
    with wds.TarWriter(str(folder / "0.tar")) as writer:
        for n, label in enumerate(labels):
            cls = {} if label is None else {"cls": str(label).encode()}
            writer.write({"__key__": f"{n:02d}", "png": encoded(pixels(n)), **cls})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("classes"), ["ape", "bee", "cat"])


# Labels that are dropped


def test_whether_a_label_is_dropped_is_a_function_of_seed_and_position() -> None:
    label, position = torch.arange(10_000) % 7, torch.arange(10_000) + 2**33
    dropped = drop_labels(label, position, seed=5, probability=0.1, null=7)
    kept = dropped != 7
    assert torch.equal(dropped[kept], label[kept])
    assert abs((~kept).float().mean().item() - 0.1) < 5 * (0.09 / 10_000) ** 0.5
    parts = [
        drop_labels(label[some], position[some], seed=5, probability=0.1, null=7)
        for some in torch.randperm(10_000, generator=torch.Generator().manual_seed(1)).split(777)
    ]
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(parts), dropped[order])
    other = drop_labels(label, position, seed=6, probability=0.1, null=7)
    both = ((other == 7) & ~kept).float().mean().item()
    assert abs(both - 0.01) < 0.006  # independent of each other


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_dropped_in_training_alone(shards: Path, tmp_path: Path, kind: str) -> None:
    """The batch of a training step, and of its replay, has null labels; what validation conditions on has none."""
    network = overrides(**KINDS[kind])[1::2]
    config = load_config(write_config(tmp_path, shards), *CONDITIONAL, *network)
    batch = {
        "image": torch.zeros(200, 3, 8, 8, dtype=torch.uint8),
        "position": torch.arange(200),
        "label": torch.arange(200) % CLASSES,
    }
    trained = device_batch(batch, config, torch.device("cpu"))
    expected = drop_labels(batch["label"], batch["position"], seed=config.seed, probability=0.3, null=CLASSES)
    assert torch.equal(trained.cond["label"], expected)
    assert 30 < (expected == CLASSES).sum() < 90
    assert torch.equal(conditioning(batch, config, torch.device("cpu"))["label"], batch["label"])
    without = load_config(tmp_path / "run.toml", *CONDITIONAL, *network, "model.label_drop=0.0")
    assert torch.equal(device_batch(batch, without, torch.device("cpu")).cond["label"], batch["label"])


# The network


def test_a_network_without_classes_is_what_it_was() -> None:
    """The same tensors, of the same values; with classes one more, which is initialised last."""
    torch.manual_seed(0)
    plain = UNet(SMALL, 3)
    torch.manual_seed(0)
    labelled = UNet(SMALL.model_copy(update={"classes": 4}), 3)
    before, after = plain.state_dict(), labelled.state_dict()
    assert after.keys() - before.keys() == {"label_embedding.weight"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["label_embedding.weight"].shape == (4, 128)


def test_the_embedding_of_the_class_is_added_to_that_of_the_timestep() -> None:
    torch.manual_seed(0)
    network = UNet(SMALL.model_copy(update={"classes": 4}), 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 9]), torch.tensor([1, 3])
    found = network(x, t, label=label)
    shift = network.label_embedding.weight[label]
    network.label_embedding = None
    embed = network.temb.forward
    network.temb.forward = lambda t, dtype: embed(t, dtype) + shift  # type: ignore[method-assign]
    assert torch.equal(network(x, t), found)


@pytest.mark.parametrize(("classes", "drop", "rows", "null"), [(None, 0.0, 0, None), (3, 0.0, 3, None), (3, 0.1, 4, 3)])
def test_the_null_class_is_there_where_labels_are_dropped(
    classes: int | None, drop: float, rows: int, null: int | None
) -> None:
    section = DDPMUNetConfig(
        image_size=8,
        base_channels=32,
        channel_multipliers=[1],
        attention_resolutions=[],
        classes=classes,
        label_drop=drop,
    )
    assert (section.label_rows, section.null_label) == (rows, null)
    assert (class_conditional(section) is None) == (classes is None)
    assert example_inputs(section, 2)[2].keys() == ({"label"} if classes else set())


def test_a_conditional_network_is_not_exported_as_another_one() -> None:
    with pytest.raises(ConversionError, match=r"model\.classes: a network that takes labels cannot be exported"):
        unet_settings(UNet(SMALL.model_copy(update={"classes": 10}), 3))


# Refusals


def opened(tmp_path: Path, *paths: Path) -> None:
    """Open the datasets, several as a mixture, for a network of three classes."""
    config = load_config(write_config(tmp_path, paths[0]), *CONDITIONAL)
    if len(paths) > 1:
        mixture = [MixtureEntry(path=str(path), weight=1.0) for path in paths]
        data = config.data.model_copy(update={"path": None, "mixture": mixture})
        config = config.model_copy(update={"data": data})
    open_training_data(config, index_folder=None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_takes_labels_must_be_given_them(shards: Path, tmp_path: Path, kind: str) -> None:
    network = overrides(**KINDS[kind])[1::2]
    config = load_config(write_config(tmp_path, shards), f"model.classes={CLASSES}", *network)
    with pytest.raises(ConfigError, match=r"^data.cond = \[\]: the network takes label; add it$"):
        build_network(config)
    with pytest.raises(ConfigError, match=r"label_drop = 0.1: goes with classes; set classes, or leave it out"):
        load_config(tmp_path / "run.toml", "model.label_drop=0.1", *network)


def test_labels_that_are_too_large_or_missing_are_one_line(tmp_path: Path) -> None:
    for name, labels, message in (
        (
            "large",
            [0, 3, 1],
            r"member 01\.png \(sample 1\): has the label 3; with model.classes = 3 it should be from 0 to 2",
        ),
        ("negative", [0, -2, 1], r"member 01\.png \(sample 1\): has the label -2; with model.classes = 3 it should be"),
        ("none", [0, 1, None, None], r"member 02\.png \(sample 2\): has no label, as 2 of 4 samples have none; model"),
        ("sentinel", [0, -1, 1], r"member 01\.png \(sample 1\): has no label, as 1 of 3 samples have none"),
    ):
        with pytest.raises(DataError, match=message) as error:
            opened(tmp_path, tars(tmp_path / name, labels))
        assert "\n" not in str(error.value)
    opened(tmp_path, tars(tmp_path / "right", [0, 2, 1]))


def test_labels_that_mean_different_things_in_a_mixture_are_refused(shards: Path, tmp_path: Path) -> None:
    same, other = (
        prepare(tmp_path / name, names) for name, names in (("s", ["ape", "bee", "cat"]), ("o", ["dog", "elk"]))
    )
    opened(tmp_path, shards, same)
    with pytest.raises(
        DataError, match=rf"^data\.mixture: the label 0 is 'ape' in {shards} and 'dog' in {other}; prep"
    ):
        opened(tmp_path, shards, other)
    plain, further, apart = (
        tars(tmp_path / name, labels) for name, labels in (("p", [0, 1]), ("f", [1, 2]), ("a", [2, 2]))
    )
    opened(tmp_path, plain, apart)
    with pytest.raises(DataError, match=r"the label 1 is a class without a name in .*/p and a class without a name in"):
        opened(tmp_path, plain, further)
    with pytest.raises(DataError, match=r"the label 2 is 'cat' in .* and a class without a name in .*/a; prepare them"):
        opened(tmp_path, shards, apart)
