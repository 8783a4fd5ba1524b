"""A step that was not finite is computed again from its dump, and told where the first NaN came from."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.faults import Fault
from tests.harness import checkpoint, launch, load_config, logged, overrides, write_config
from trainer import replay as program
from trainer.data.training_data import open_training_data
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.engine.build import build_objective
from trainer.engine.step.nonfinite_dump import DumpedSample, NonFiniteDump
from trainer.inspection.origin import Watch, gradient_norms

Tell = Callable[..., str]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tell:
    def call(*arguments: object, expect: int) -> str:
        monkeypatch.setattr(sys, "argv", ["replay", *map(str, arguments), "--device", "cpu"])
        code = program.main()
        printed = capsys.readouterr()
        assert code == expect, printed
        return printed.err if expect == 2 else printed.out

    return call


def test_weights_that_explode_do_so_again(tmp_path: Path, dataset: Path, tell: Tell) -> None:
    config = str(write_config(tmp_path, dataset))
    explosive = overrides(optimizer__learning_rate=1e30, train__micro_batch=2, train__duration="4 steps")
    launch(2, "--config", config, *explosive)
    said = tell(tmp_path / "run" / "nonfinite" / "step-00000004.json", expect=0)
    assert "step-00000004, the weights of that step" in said  # the last one that was applied is the second
    assert "gradient norm nan: not finite again" in said
    assert "first module whose output is not finite: " in said
    assert "samples whose loss is not finite: 8 of 8" in said
    (weights,) = [line for line in said.splitlines() if line.startswith("  conv_in ")]
    assert weights.split()[-1] != "0"


def test_a_fault_that_came_from_elsewhere_is_not_reproduced(tmp_path: Path, dataset: Path, tell: Tell) -> None:
    nan = Fault(action="nan", point="device_batch", call=4, rank=0)
    launch(1, "--config", str(write_config(tmp_path, dataset)), fault=nan)
    dump = tmp_path / "run" / "nonfinite" / "step-00000004.json"
    said = tell(dump, expect=1)
    assert "finite; NOT reproduced" in said
    assert "samples whose loss is not finite: 0 of 8" in said
    assert "first module" not in said
    earlier = tell(dump, "--checkpoint", checkpoint(tmp_path / "run", 2), expect=1)
    assert "1 updates before that step" in earlier


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
def test_the_same_numbers_as_in_training(
    tmp_path: Path, dataset: Path, tell: Tell, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    """A step that was finite: its loss and gradient norm are the logged ones, accumulation and dropout included."""
    path, run = write_config(tmp_path, dataset), tmp_path / "run"
    accumulated = overrides(train__micro_batch=2, checkpoint__every="1 steps", diffusion__timestep_sampling=sampling)
    launch(1, "--config", str(path), *accumulated)
    config = load_config(run / "config.toml")
    data = open_training_data(config, index_folder=None)
    positions = torch.arange(32, 40)
    noise = KeyedNoise.training(config.seed, positions)
    t, weight = build_objective(config, torch.device("cpu")).times.draw(noise)  # uniform as yet: nothing is recorded
    weights = [None] * 8 if weight is None else weight.tolist()
    ids = data.order.ids(positions.numpy()).tolist()
    dump = NonFiniteDump(
        step=5,
        loss="nan",
        grad_norm="nan",
        seed=3,
        updates=4,
        micro_batch=2,
        precision="fp32",
        device="cpu",
        samples=[
            DumpedSample(position=p, id=i, t=k, weight=w, image="")
            for p, i, k, w in zip(positions.tolist(), ids, t.tolist(), weights)
        ],
    )
    dump.write(run / "nonfinite" / "step-00000005.json")
    found = []
    monkeypatch.setattr(program, "as_text", lambda result: found.append(result) or "")
    tell(run / "nonfinite" / "step-00000005.json", "--checkpoint", checkpoint(run, 4), expect=1)
    (result,) = found
    assert result.outcome.loss == pytest.approx(logged(run)[5], rel=1e-6)
    assert result.outcome.grad_norm == pytest.approx(logged(run, "train/grad_norm")[5], rel=1e-5)


def test_what_is_no_dump_is_told_in_one_line(tmp_path: Path, dataset: Path, tell: Tell) -> None:
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    bare = run / "nonfinite" / "step-00000003.json"
    bare.parent.mkdir(parents=True)
    bare.write_text('{"step": 3}')
    assert "step-00000003.json: no dump of a step that can be computed again: loss: Field required" in tell(
        bare, expect=2
    )
    launch(1, "--config", str(config), *overrides(checkpoint__every="0 steps"), fault=_nan_in(4))
    dump = run / "nonfinite" / "step-00000004.json"
    assert "has no whole checkpoint of step 4 or before" in tell(dump, expect=2)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("seed = 3", "seed = 4"))
    assert "of a run with seed 3, config.toml beside it has 4" in tell(dump, expect=2)


def _nan_in(step: int) -> Fault:
    return Fault(action="nan", point="device_batch", call=step, rank=0)


class _Network(nn.Module):
    """`spoil` acts on what the second of three samples has become behind the second layer."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Sequential(nn.Linear(3, 3), _Spoilt(spoil))
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


class _Spoilt(nn.Module):
    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat((h[:1], self.spoil(h[1:2]), h[2:]))


def _watched(spoil: Callable[[Tensor], Tensor]) -> tuple[Watch, nn.Module]:
    network = _Network(spoil)
    with Watch(network, positions=[10, 11, 12]) as watch:
        output = network(torch.ones(3, 3))
    output.sum().backward()
    return watch, network


def test_the_first_module_and_the_sample_are_named() -> None:
    watch, _ = _watched(lambda h: h / 0)
    assert watch.forward is not None
    assert (watch.forward.module, watch.forward.kind, watch.forward.positions) == ("second.1", "_Spoilt", [11])


def test_a_gradient_that_alone_is_not_finite_is_found() -> None:
    watch, network = _watched(lambda h: (h - h).abs().sqrt())  # zero, and infinitely steep there
    assert watch.forward is None
    assert watch.backward is not None
    assert (watch.backward.module, watch.backward.kind) == ("second.0", "Linear")
    assert watch.backward.positions == [11]
    norms = {norm.module: norm for norm in gradient_norms(network)}
    assert list(norms) == ["first", "second.0", "last"]
    assert norms["second.0"].nonfinite > 0
    assert norms["last"].nonfinite == 0
