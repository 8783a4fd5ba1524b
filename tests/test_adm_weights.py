"""OpenAI's weights come in and go out to the bit, or are refused by the name of what does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.adm import CONDITIONAL, NETWORKS, golden_weights, unet
from tests.harness import write_config
from tests.networks import make_run
from tests.test_convert_export import run_convert
from trainer.errors import ConversionError
from trainer.interop.openai import from_openai, to_openai
from trainer.models.adm_classifier import ADMClassifier
from trainer.models.adm_unet import ADMUNet


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_openais_weights_come_in_and_go_out_to_the_bit(build: Callable[[], ADMUNet | ADMClassifier]) -> None:
    network = build()
    published = golden_weights(network)
    network.load_state_dict(from_openai(published, network, source="golden"))
    again = to_openai(network.state_dict(), network)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], published[name]) for name in published)


@pytest.mark.parametrize(
    ("network", "published"),
    [
        (
            "attention",
            {
                "out.0.weight": (64,),
                "out.2.positional_embedding": (64, 257),
                "out.2.qkv_proj.weight": (192, 64, 1),
                "out.2.qkv_proj.bias": (192,),
                "out.2.c_proj.weight": (10, 64, 1),
            },
        ),
        ("adaptive", {"out.0.weight": (64,), "out.3.weight": (10, 64, 1, 1)}),
        ("spatial", {"out.0.weight": (2048, 32 + 32 + 32 + 64 + 64), "out.2.weight": (10, 2048)}),
        (
            "convolutions",
            {"input_blocks.2.0.op.weight": (32, 32, 3, 3), "output_blocks.1.2.conv.weight": (64, 64, 3, 3)},
        ),
        (
            "upsampler",
            {
                "input_blocks.0.0.weight": (32, 6, 3, 3),
                "input_blocks.3.0.skip_connection.weight": (64, 32, 1, 1),
                "input_blocks.3.1.qkv.weight": (192, 64, 1),
                "middle_block.1.proj_out.weight": (64, 64, 1),
                "label_emb.weight": (10, 128),
            },
        ),
    ],
)
def test_names_and_shapes_are_the_published_ones(network: str, published: dict[str, tuple[int, ...]]) -> None:
    built = NETWORKS[network]()
    found = to_openai(built.state_dict(), built)
    assert {name: tuple(found[name].shape) for name in published} == published


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"label_emb.weight": None}, "golden: label_emb.weight: missing (1 of"),
        (
            {"label_emb.weight": torch.zeros(11, 128)},
            "golden: label_emb.weight: shape (11, 128), the network has (10, 128)",
        ),
        ({"out.4.weight": torch.zeros(1)}, "golden: out.4.weight: of no layer of this network"),
        ({"out.0.weight": torch.full((32,), torch.nan)}, "golden: out.0.weight: holds NaN or infinity"),
    ],
    ids=["missing", "shape", "left over", "nan"],
)
def test_what_does_not_fit_is_refused_by_its_name(changes: dict[str, Tensor | None], line: str) -> None:
    network = unet(**CONDITIONAL)
    tensors = {name: tensor for name, tensor in (golden_weights(network) | changes).items() if tensor is not None}
    with pytest.raises(ConversionError) as refused:
        from_openai(tensors, network, source="golden")
    assert str(refused.value).startswith(line)


def adm_run(folder: Path) -> Path:
    run, _ = make_run(folder, "model.kind=adm-unet", "model.heads=2")
    return run


def test_a_run_goes_out_to_openais_layout_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "exported"
    assert run_convert(monkeypatch, "export", "--run", adm_run(tmp_path), "--out", out) == 0
    published = torch.load(out / "model.pt", weights_only=True)
    assert published["input_blocks.2.0.in_layers.0.weight"].shape == (8,)
    source = ("import", out / "model.pt", "--config", out / "config.toml", "--out", tmp_path / "again")
    assert run_convert(monkeypatch, *source) == 0
    run_out = ("export", "--run", tmp_path / "again", "--weights", "model", "--out", tmp_path / "exported again")
    assert run_convert(monkeypatch, *run_out) == 0
    again = torch.load(tmp_path / "exported again" / "model.pt", weights_only=True)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], published[name]) for name in published)


def test_what_cannot_be_converted_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = adm_run(tmp_path)
    assert run_convert(monkeypatch, "export", "--run", run, "--out", tmp_path / "out") == 0
    weights, into = tmp_path / "out" / "model.pt", ("--out", tmp_path / "refused")
    text = (tmp_path / "out" / "config.toml").read_text()
    other, wider = write_config(tmp_path, tmp_path, "other"), tmp_path / "wider.toml"
    wider.write_text(text.replace("base_channels = 8", "base_channels = 16"))
    capsys.readouterr()
    for arguments, line in (
        (("import", weights, *into), "OpenAI's weights do not describe their network; give a configuration"),
        (
            ("import", weights, "--config", other, *into),
            'with model.kind = "adm-unet" or "adm-classifier", not "ddpm-unet"',
        ),
        (("import", weights, "--config", wider, *into), "shape (32, 8), the network has (64, 16)"),
        (("import", weights, "--config", wider, "--image-size", 8, *into), "--image-size 8: "),
        (("export", "--run", run, "--license", "mit", *into), '--license mit: is for the model card of a "ddpm-unet"'),
    ):
        assert run_convert(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert line in error
        assert not (tmp_path / "refused").exists()
