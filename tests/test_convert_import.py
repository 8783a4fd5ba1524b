"""Imported weights are the ones that were there, in the network that they were trained in, or they are refused."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from tests.harness import checkpoint, events, launch, overrides, tensors_of
from tests.networks import make_run, randomise, reference
from tests.test_convert_export import TWO_LEVELS, export, network_of, run_convert
from trainer.config import Config
from trainer.diffusion.schedules import make_betas
from trainer.engine.checkpoints import Checkpoints
from trainer.engine.processes import make_accelerator
from trainer.engine.run import check_identity, identity
from trainer.errors import CheckpointError
from trainer.models.unet import UNetConfig

CIFAR10 = UNetConfig(image_size=32, base_channels=32)
CELEBA64 = UNetConfig(image_size=64, base_channels=32, channel_multipliers=(1, 2, 2, 2, 4))
LSUN256 = UNetConfig(image_size=256, base_channels=32, channel_multipliers=(1, 1, 2, 2, 4, 4))

SMALL = UNetConfig(
    image_size=8,
    base_channels=8,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_resolutions=(4,),
    norm_groups=4,
)

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# As published, fields of later versions left out.
PUBLISHED_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
PUBLISHED_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def is_attention_weight(name: str) -> bool:
    return any(f".{part}." in name for part in OLD_NAMES) and name.endswith("weight")


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pattern = re.compile("|".join(map(re.escape, OLD_NAMES)))
    return {pattern.sub(lambda match: OLD_NAMES[match[0]], name): value for name, value in tensors.items()}


def as_convolutions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v[:, :, None, None] if is_attention_weight(name) else v for name, v in tensors.items()}


def authors_names(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' names to pytorch_diffusion's, where `up` counts from the finest level."""
    renamed = {}
    for name, value in as_convolutions(tensors).items():
        name = re.sub(r"^up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        name = re.sub(r"^mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        for pattern, theirs in (
            (r"^down_blocks", "down"),
            (r"^mid_block\.attentions\.0", "mid.attn_1"),
            (r"\.resnets\.", ".block."),
            (r"\.attentions\.", ".attn."),
            (r"(down|up)samplers\.0", r"\1sample"),
            (r"time_embedding\.linear_1", "temb.dense.0"),
            (r"time_embedding\.linear_2", "temb.dense.1"),
            (r"time_emb_proj", "temb_proj"),
            (r"conv_shortcut", "nin_shortcut"),
            (r"conv_norm_out", "norm_out"),
            (r"group_norm", "norm"),
            (r"to_out\.0", "proj_out"),
            (r"\.to_([qkv])\.", r".\1."),
        ):
            name = re.sub(pattern, theirs, name)
        renamed[name] = value
    return renamed


def publish(folder: Path, network: UNetConfig, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder like google/ddpm-*: everything in one place, weights in a pickle."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        theirs = reference(network).config
    settings = PUBLISHED_UNET | {
        "sample_size": network.image_size,
        "norm_num_groups": network.norm_groups,
        "layers_per_block": network.blocks_per_level,
        **{name: list(theirs[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")},
    }
    (folder / "config.json").write_text(json.dumps(settings | changes))
    (folder / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER))
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    return folder


def largest_difference(run: Path, theirs: torch.nn.Module, side: int) -> float:
    config = Config.load(run / "config.toml")
    x, t = torch.randn(2, 3, side, side), torch.tensor([3, 871])
    with torch.no_grad():
        outputs = [network_of(run, config, kind, step=0)(x, t) for kind in ("ema", "model")]
        expected = theirs(x, t).sample
    assert 0.3 < expected.std() < 3
    return max((output - expected).abs().max().item() for output in outputs)


@pytest.mark.parametrize(
    ("network", "form"),
    [
        pytest.param(CIFAR10, old_names, id="cifar10-old-names"),
        pytest.param(CELEBA64, lambda tensors: as_convolutions(old_names(tensors)), id="celeba64-old-convolutions"),
        pytest.param(LSUN256, dict, id="lsun256-new-names"),
    ],
)
def test_the_published_layout_gives_diffusers_output(
    network: UNetConfig,
    form: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = reference(network)
    randomise(theirs)
    source = publish(tmp_path / "ddpm", network, form(theirs.state_dict()))
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 0
    assert largest_difference(tmp_path / "run", theirs, side=32) < 1e-5
    config = Config.load(tmp_path / "run" / "config.toml")
    assert config.model.image_size == network.image_size
    assert config.model.attention_resolutions == [16]
    assert (config.diffusion.timesteps, config.diffusion.schedule) == (1000, "linear")
    assert config.diffusion.variance == "large"
    assert config.run_dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("network", "prefix", "suffix"),
    [
        pytest.param(CIFAR10, "", "ckpt", id="cifar10"),
        pytest.param(CELEBA64, "module.", "pth", id="celeba64-data-parallel"),
        pytest.param(LSUN256, "", "safetensors", id="lsun256-safetensors"),
    ],
)
def test_the_authors_layout_gives_diffusers_output(
    network: UNetConfig, prefix: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = reference(network)
    randomise(theirs)
    levels = len(network.channel_multipliers)
    tensors = {prefix + name: value for name, value in authors_names(theirs.state_dict(), levels).items()}
    source = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, source)
    else:
        torch.save(tensors, source)
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 0
    assert largest_difference(tmp_path / "run", theirs, side=32) < 1e-5
    config = Config.load(tmp_path / "run" / "config.toml")
    assert (config.model.image_size, config.model.attention_resolutions) == (network.image_size, [16])
    assert config.diffusion.variance == ("large" if network.image_size == 32 else "small")


def test_the_side_of_the_images_is_asked_for_where_it_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = UNetConfig(
        image_size=16, base_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(16, 8)
    )
    source = tmp_path / "model.ckpt"
    torch.save(authors_names(reference(network).state_dict(), 2), source)
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 2
    assert "attends at 2 levels, so the side of its images is not known; give it by" in capsys.readouterr().err
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run", "--image-size", 16) == 0
    model = Config.load(tmp_path / "run" / "config.toml").model
    assert (model.image_size, model.attention_resolutions, model.blocks_per_level) == (16, [16, 8], 1)


@pytest.mark.parametrize("kind", ["ema", "model"])
@pytest.mark.parametrize("saved_by", ["us", "DDPMPipeline", "DDIMPipeline"])
def test_import_of_an_export_is_the_identity(
    saved_by: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(tmp_path, *TWO_LEVELS, "diffusion.schedule=cosine")
    source, more = export(monkeypatch, run, "--weights", kind), []
    if saved_by != "us":
        pipeline = {"DDPMPipeline": DDPMPipeline, "DDIMPipeline": DDIMPipeline}[saved_by]
        pipeline.from_pretrained(source).save_pretrained(tmp_path / "again")
        source = tmp_path / "again"
    if saved_by == "DDIMPipeline":  # knows no variance
        more = ["--set", "diffusion.variance=small"]
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "imported", *more) == 0
    before, after = tensors_of(run, 3), tensors_of(tmp_path / "imported", 0)
    names = [name.removeprefix("ema/") for name in before if name.startswith("ema/")]
    weights = {name for name in after if not name.startswith("optimizer.")}
    assert weights == {f"{group}/{name}" for group in ("ema", "model") for name in names}
    for name in names:
        for group in ("ema", "model"):
            assert torch.equal(after[f"{group}/{name}"], before[f"{kind}/{name}"])
    imported = Config.load(tmp_path / "imported" / "config.toml")
    assert imported.model == config.model
    assert imported.diffusion == config.diffusion


@pytest.mark.parametrize("given", ["run", "checkpoint"])
@pytest.mark.parametrize("kind", ["ema", "model"])
def test_a_run_and_its_checkpoint_can_be_started_from(
    given: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(tmp_path, "diffusion.variance=large")
    source = run if given == "run" else checkpoint(run, 3)
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "new", "--weights", kind) == 0
    before, after = tensors_of(run, 3), tensors_of(tmp_path / "new", 0)
    weights = {name: value for name, value in after.items() if name.startswith(("model/", "ema/"))}
    assert all(torch.equal(value, before[f"{kind}/{name.partition('/')[2]}"]) for name, value in weights.items())
    assert not any(value.any() for name, value in after.items() if name.startswith("optimizer."))
    imported = Config.load(tmp_path / "new" / "config.toml")
    assert (imported.model, imported.diffusion) == (config.model, config.diffusion)


def test_imported_weights_are_sampled_and_trained_further(tmp_path: Path, dataset: Path) -> None:
    run, _ = make_run(tmp_path)
    imported = tmp_path / "imported"
    config = tmp_path / "run.toml"
    launch(1, "import", str(run), "--out", str(imported), "--config", str(config), script="convert")
    launch(1, "--run", str(imported), "--n", "1", script="sample")
    assert (imported / "samples" / "step-00000000-ema-seed-0" / "000000.png").exists()
    data = overrides(data__path=str(dataset), optimizer__learning_rate=1e-12, train__ema_decay=0.0)
    launch(2, "--config", str(imported / "config.toml"), *data)
    first, changed, started = events(imported)[:3]
    assert [event["event"] for event in (first, changed, started)] == ["imported", "configuration", "started"]
    assert started["resumed_from"] == str(checkpoint(imported, 0))
    before, after = tensors_of(imported, 0), tensors_of(imported, 6)
    for name, value in before.items():
        if name.startswith("optimizer."):
            continue
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    # From here on it is a run like any other: seed and data are what they were.
    output = launch(1, "--config", str(imported / "config.toml"), *data, "--set", "seed=4", expect=2)
    assert "seed: 3 in the checkpoint, 4 now" in output


def test_imported_weights_are_not_trained_as_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    assert run_convert(monkeypatch, "import", run, "--out", tmp_path / "new") == 0
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", make_accelerator())
    path, damaged = checkpoints.find_verified()
    assert path is not None
    assert not damaged
    saved = json.loads((path / "manifest.json").read_text())["identity"]
    trained = {**saved, "seed": 1, "data.flip": True, "train.global_batch": 8, "data (manifest)": "f"}
    check_identity(saved, trained, path)
    with pytest.raises(CheckpointError, match=r"model\.base_channels: 8 in the checkpoint, 16 now"):
        check_identity(saved, {**trained, "model.base_channels": 16}, path)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("where", ["ddpm/diffusion_pytorch_model.bin", "model.ckpt", "model.pth"])
def test_no_pickle_is_executed(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, file = tmp_path / "trace", tmp_path / where
    tensors: dict[str, Any] = dict(reference(SMALL).state_dict())
    publish(tmp_path / "ddpm", SMALL, tensors)
    torch.save({**tensors, "conv_in.weight": Malicious(trace)}, file)
    source = file.parent if "ddpm" in where else file
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: no pickle that holds only tensors, so it is not loaded")
    assert not trace.exists()
    assert not (tmp_path / "run").exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: Path, *more: str) -> str:
    out = source.parent / "refused"
    assert run_convert(monkeypatch, "import", source, "--out", out, *more) == 2
    assert not out.exists()
    assert not list(out.parent.glob(".refused*"))
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("freq_shift", 0, "should be 1"),
        ("flip_sin_to_cos", True, "should be False"),
        ("downsample_padding", 1, "should be 0"),
        ("attention_head_dim", 8, "should be None"),
        ("norm_eps", 1e-5, "should be 1e-06"),
        ("mid_block_type", None, "should be 'UNetMidBlock2D'"),
        ("center_input_sample", True, "should be False"),
        ("time_embedding_type", "fourier", "should be 'positional'"),
        ("resnet_time_scale_shift", "scale_shift", "should be 'default'"),
        ("add_attention", False, "should be True"),
        ("act_fn", "relu", "should be 'silu'"),
        ("out_channels", 4, "should be in_channels, 3, or twice as many"),
        ("sample_size", None, "should be the side of square images"),
        ("sample_size", [8, 16], "should be the side of square images"),
        ("block_out_channels", [8, 12], "each should be a multiple of the first, 8"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], "each should be one of DownBlock2D, AttnDownBlock2D"),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"], "should have attention where down_block_types have it"),
        ("encoder_hid_dim", 3, "a setting that this network does not have"),
        ("_class_name", "UNet2DConditionModel", "should be 'UNet2DModel'"),
    ],
)
def test_a_setting_of_another_network_is_refused_by_its_name(
    field: str,
    value: object,
    right: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict(), **{field: value})
    line = refusal(monkeypatch, capsys, source)
    assert line.startswith(f"error: {source}/config.json: {field} = {value!r}: {right}")


@pytest.mark.parametrize(
    "field", ["freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim", "norm_eps"]
)
def test_a_setting_that_is_left_out_means_diffusers_default(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    settings = json.loads((source / "config.json").read_text())
    del settings[field]
    (source / "config.json").write_text(json.dumps(settings))
    default = inspect.signature(UNet2DModel).parameters[field].default
    assert f"{field} is left out, which means {default!r}: should be" in refusal(monkeypatch, capsys, source)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "flow_prediction"),
        ("clip_sample", False),
        ("clip_sample_range", 2.0),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("variance_type", "learned"),
        ("beta_schedule", "sigmoid"),
    ],
)
def test_another_process_is_refused_by_the_schedulers_field(
    field: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    (source / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER | {field: value}))
    line = refusal(monkeypatch, capsys, source)
    assert line.startswith(f"error: {source}/scheduler_config.json: ")
    assert f"{field} = {value!r}" in line


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_table_of_betas_is_recognised_and_nothing_near_it(
    schedule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    betas = make_betas(schedule, 500)
    for name, table in (("near", betas * 0.999), ("same", betas.float())):
        settings = PUBLISHED_SCHEDULER | {"trained_betas": table.tolist(), "num_train_timesteps": 500}
        (source / "scheduler_config.json").write_text(json.dumps(settings))
        assert run_convert(monkeypatch, "import", source, "--out", tmp_path / name) == 0
        diffusion = Config.load(tmp_path / name / "config.toml").diffusion
        assert (diffusion.schedule, diffusion.timesteps) == (schedule if name == "same" else "table", 500)
        assert diffusion.betas == (None if name == "same" else table.tolist())


NAME = "down_blocks.1.attentions.0.to_k.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"{NAME}: missing (1 of 144 tensors are)"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra: of no layer of this network"),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(16, 8)}),
            f"{NAME}: shape (16, 8), the network has (16, 16)",
        ),
        (lambda tensors: tensors.update({NAME: torch.zeros(16, 16, 3, 3)}), f"{NAME}: shape (16, 16, 3, 3), the"),
        (lambda tensors: tensors[NAME][3, 4].fill_(float("nan")), f"{NAME}: holds NaN or infinity"),
        (lambda tensors: tensors[NAME][3, 4].fill_(float("-inf")), f"{NAME}: holds NaN or infinity"),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(16, 16, dtype=torch.int64)}),
            f"{NAME}: torch.int64, weights are floating point numbers",
        ),
        (lambda tensors: tensors.update({NAME: "text"}), f"{NAME}: a str; a state dict holds tensors only"),
    ],
)
def test_a_wrong_tensor_is_refused_by_its_name(
    damage: Callable[[dict[str, Any]], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = {name: value.clone() for name, value in reference(SMALL).state_dict().items()}
    damage(tensors)
    source = publish(tmp_path / "ddpm", SMALL, tensors)
    line = refusal(monkeypatch, capsys, source)
    assert line.startswith(f"error: {source}/diffusion_pytorch_model.bin: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "ema"], "--weights ema: {source} is no run or checkpoint of ours"),
        (["--image-size", "8"], "--image-size 8: {source} says itself"),
        (["--set", "model.base_channels=16"], "model.base_channels = 16: the weights in {source} have 8"),
        (["--set", "diffusion.timesteps=10"], "diffusion.timesteps = 10: the weights in {source} have 1000"),
        (["--set", "model.bas_channels=16"], "{source} (choose by --set what it does not say): model.bas_channels: "),
        (["--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
    ],
)
def test_choices_that_the_source_does_not_leave_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    line = refusal(monkeypatch, capsys, source, *arguments)
    assert line.startswith("error: " + message.format(source=source))


def test_dropout_variance_and_training_are_free_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    chosen = overrides(model__dropout=0.3, diffusion__variance="small", train__global_batch=7, data__path="mine")
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run", *chosen) == 0
    config = Config.load(tmp_path / "run" / "config.toml")
    assert (config.model.dropout, config.diffusion.variance) == (0.3, "small")
    assert (config.train.global_batch, config.data.path) == (7, "mine")


def test_what_is_no_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    torch.save(reference(SMALL).state_dict(), tmp_path / "diffusers.bin")
    for name, message in (
        ("nothing", "nothing: no such file or folder"),
        ("empty", "empty/config.json: cannot be read"),
        ("broken.ckpt", "broken.ckpt: no pickle that holds only tensors"),
        ("broken.safetensors", "broken.safetensors: cannot be read"),
        ("list.ckpt", "list.ckpt: holds a list, should be a state dict"),
        ("other.ckpt", "other.ckpt: conv_in.weight: shape (1,), should be a convolution's"),
        ("diffusers.bin", "diffusers.bin: no state dict in the layout of pytorch_diffusion"),
    ):
        assert message in refusal(monkeypatch, capsys, tmp_path / name)


def test_an_existing_folder_is_never_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path)
    before = sorted(run.rglob("*"))
    assert run_convert(monkeypatch, "import", run, "--out", run) == 2
    assert f"error: --out {run}: exists already" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_what_half_of_the_output_means_is_not_changed_by_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "diffusion.variance=learned-range", "diffusion.loss=hybrid")
    learned = ("--set", "diffusion.variance=learned", "--set", "diffusion.loss=bound")
    line = refusal(monkeypatch, capsys, run, *learned)
    assert "diffusion.variance = 'learned': the weights in" in line
    assert "have 'learned-range'" in line
    assert identity(config, None)["diffusion.variance"] == "learned-range"
