"""The group norm for channels_last images on CPUs is torch's: in float64 to rounding, and as good as torch's below."""

import pytest
import torch
import torch.nn.functional as F

from trainer.models import group_norm as group_norm_module
from trainer.models.group_norm import GroupNorm

GROUPS = 8


def norm(channels: int, dtype: torch.dtype = torch.float32) -> GroupNorm:
    torch.manual_seed(0)
    layer = GroupNorm(GROUPS, channels, eps=1e-6)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer.to(dtype)


def images(channels: int, dtype: torch.dtype, side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(8, channels, side, side, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * 2 + 1
    return tuple(image.to(dtype).contiguous(memory_format=torch.channels_last) for image in (x, dy))


def gradients(layer: GroupNorm, x: torch.Tensor, dy: torch.Tensor, *, by_torch: bool = False) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = F.group_norm(x, GROUPS, layer.weight, layer.bias, layer.eps) if by_torch else layer(x)
    return [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)]


@pytest.fixture
def own_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    apply = group_norm_module.ChannelsLastGroupNorm.apply
    monkeypatch.setattr(
        group_norm_module.ChannelsLastGroupNorm, "apply", lambda *arguments: calls.append(1) or apply(*arguments)
    )
    return calls


@pytest.mark.parametrize("side", [24, 32])
@pytest.mark.parametrize("channels", [8, 16, 24])
def test_in_float64_it_is_torchs(channels: int, side: int, own_calls: list[int]) -> None:
    layer, (x, dy) = norm(channels, torch.float64), images(channels, torch.float64, side)
    for own, expected in zip(gradients(layer, x, dy), gradients(layer, x.contiguous(), dy, by_torch=True), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)
    assert own_calls


@pytest.mark.parametrize("side", [24, 32])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_below_it_is_as_near_to_the_truth_as_torchs(
    dtype: torch.dtype, weights: torch.dtype, side: int, own_calls: list[int]
) -> None:
    if dtype == torch.float32 and weights == torch.bfloat16:
        pytest.skip("torch knows no such mixture")
    layer, (x, dy) = norm(16, weights), images(16, dtype, side)
    truth = gradients(norm(16, weights).double(), x.double(), dy.double(), by_torch=True)
    own, torchs = gradients(layer, x, dy), gradients(layer, x, dy, by_torch=True)
    assert own_calls
    for mine, theirs, true in zip(own, torchs, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        error, allowed = ((found.double() - true).abs().max().item() for found in (mine, theirs))
        assert error <= 3 * allowed + 1e-6  # each number is rounded a few times on either way


@pytest.mark.parametrize(
    ("channels", "side", "memory_format"),
    [
        pytest.param(16, 24, torch.contiguous_format, id="contiguous"),
        pytest.param(64, 24, torch.channels_last, id="whole-registers"),
        pytest.param(16, 4, torch.channels_last, id="small"),
    ],
)
def test_where_torchs_is_fast_it_is_torchs(
    channels: int, side: int, memory_format: torch.memory_format, own_calls: list[int]
) -> None:
    layer, (x, dy) = norm(channels), images(channels, torch.float32, side)
    x = x.contiguous(memory_format=memory_format)
    for own, expected in zip(gradients(layer, x, dy), gradients(layer, x, dy, by_torch=True), strict=True):
        assert torch.equal(own, expected)
    assert not own_calls


@pytest.mark.parametrize("side", [24, 32])
def test_drawing_and_training_see_the_same_numbers(side: int) -> None:
    layer, (x, _) = norm(16), images(16, torch.bfloat16, side)
    with torch.no_grad():
        drawn = layer(x)
    assert torch.equal(drawn, layer(x))
