"""Shorter chains: the published spacings, and the same q at the timesteps that are kept."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from tests.diffusion_reference import linear
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import count_in_spec, kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.schedules import make_betas

# What improved-diffusion's space_timesteps (commit 6051920) returns.
SECTIONS_10_15_20_OF_300 = [
    *(0, 11, 22, 33, 44, 55, 66, 77, 88, 99),
    *(100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199),
    *(200, 205, 210, 216, 221, 226, 231, 236, 242, 247, 252, 257, 263, 268, 273, 278, 283, 289, 294, 299),
]
TWENTY_FIVE_OF_1000 = [
    *(0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791),
    *(832, 874, 916, 957, 999),
]
# What ddim's runner (skip_type "quad") visits, less the repeated ones.
QUADRATIC_10_OF_1000 = [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]


@pytest.mark.parametrize(
    ("timesteps", "spec", "expected"),
    [
        (300, "10,15,20", SECTIONS_10_15_20_OF_300),
        (1000, "25", TWENTY_FIVE_OF_1000),
        (100, "3,4,1", [0, 16, 33, 34, 45, 55, 66, 67]),
        (1000, "ddim50", list(range(0, 1000, 20))),
        (1000, "ddim9", [0, 112, 224, 336, 448, 560, 672, 784, 896]),  # stride 112 is the first that gives nine
        (1000, "quadratic10", QUADRATIC_10_OF_1000),
        (1000, "trailing10", list(range(99, 1000, 100))),
        (1000, "trailing7", [142, 285, 428, 570, 713, 856, 999]),
        (100, "trailing8", [11, 24, 37, 49, 61, 74, 87, 99]),  # 87.5 and 62.5 are rounded before 1 is taken off
        (12, "all", list(range(12))),
        (12, "12", list(range(12))),
        (12, "trailing12", list(range(12))),
    ],
)
def test_the_published_spacings(timesteps: int, spec: str, expected: list[int]) -> None:
    steps = kept_timesteps(timesteps, spec)
    assert steps.dtype == torch.int64
    assert steps.tolist() == expected


def test_quadratic_spacing_visits_a_repeated_timestep_once() -> None:
    steps = kept_timesteps(1000, "quadratic50")
    assert steps[:8].tolist() == [0, 1, 2, 5, 8, 11, 16, 21]  # 0 comes twice in the authors' list
    assert (len(steps), steps[-1].item()) == (49, 800)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fifty", "must be 'all', a count such as '50'"),
        ("", "must be 'all'"),
        ("10,", "must be 'all'"),
        ("-5", "must be 'all'"),
        ("linear5", "must be 'all'"),
        ("1", "must keep from 2 to 100 timesteps"),
        ("101", "must keep from 2 to 100 timesteps"),
        ("trailing101", "must keep from 2 to 100 timesteps"),
        ("ddim70", "no integer stride visits exactly 70 of 100"),
        ("10,51", "a section of 50 timesteps cannot give 51"),
        ("10,0", "a section of 50 timesteps cannot give 0"),
    ],
)
def test_what_is_no_spacing_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"respacing='{spec}': {message}"):
        kept_timesteps(100, spec)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("spec", ["50", "ddim20", "quadratic50", "trailing10", "10,15,25", "all"])
def test_q_is_the_same_at_the_timesteps_that_are_kept(name: str, spec: str) -> None:
    whole, steps = GaussianDiffusion(make_betas(name, 1000)), kept_timesteps(1000, spec)
    short = whole.respaced(steps)
    # The cosine schedule ends at abar = 2e-9, to which 1 - beta adds the last bit of 1.
    torch.testing.assert_close(short.abar64, whole.abar64[steps], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(short.sqrt_abar, whole.sqrt_abar[steps], rtol=1.2e-7, atol=1e-11)
    torch.testing.assert_close(short.sqrt_one_minus_abar, whole.sqrt_one_minus_abar[steps], rtol=1.2e-7, atol=0)
    assert ((short.betas > 0) & (short.betas < 1)).all()
    assert torch.equal(short.original_t(torch.arange(len(steps))), steps)


def test_the_posterior_of_a_shorter_chain_follows_from_its_own_betas() -> None:
    reference, short = linear(), GaussianDiffusion(make_betas("linear", 1000)).respaced(torch.tensor([3, 500, 999]))
    abars = [reference.abar(t) for t in (3, 500, 999)]
    betas = [1 - abars[0], 1 - abars[1] / abars[0], 1 - abars[2] / abars[1]]
    assert short.betas.tolist() == pytest.approx(betas, rel=1e-6)
    expected = betas[2] * (1 - abars[1]) / (1 - abars[2])
    log_variance = short.posterior_log_variance(torch.tensor([2]), "small").item()
    assert log_variance == pytest.approx(math.log(expected), rel=1e-6)
    clipped = math.log(betas[1] * (1 - abars[0]) / (1 - abars[1]))
    assert short.posterior_log_variance(torch.tensor([0]), "large").item() == pytest.approx(clipped, rel=1e-6)


def test_the_network_is_told_the_original_timestep_also_twice_removed() -> None:
    told: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.extend(t.tolist())
        return x

    reverse = ReverseProcess(network, GaussianDiffusion(make_betas("linear", 1000)), variance="small")
    once = reverse.respaced(torch.tensor([5, 70, 600, 900]))
    twice = once.respaced(torch.tensor([1, 3]))
    x = torch.zeros(2, 1, 1, 1)
    once(x, torch.tensor([0, 2]))
    twice(x, torch.tensor([0, 1]))
    assert told == [5, 600, 70, 900]
    assert twice.diffusion.abar64.tolist() == pytest.approx(reverse.diffusion.abar64[[70, 900]].tolist(), rel=1e-12)


@pytest.mark.parametrize(
    "steps", [[5], [3, 2], [2, 2], [-1, 4], [0, 10], [[0, 1]], [0.0, 1.0]], ids=lambda steps: str(steps)
)
def test_steps_that_are_no_part_of_the_chain_are_refused(steps: list[object]) -> None:
    with pytest.raises(ValueError, match="steps: must"):
        GaussianDiffusion(make_betas("linear", 10)).respaced(torch.tensor(steps))


def test_original_timesteps_must_fit_the_betas() -> None:
    for original in (torch.arange(3), torch.arange(4.0)):
        with pytest.raises(ValueError, match=r"original_timesteps: must be \(4,\) int64"):
            GaussianDiffusion(make_betas("linear", 4), original)


@pytest.mark.parametrize(
    ("spec", "asked", "given"),
    [
        ("quadratic40", 40, 39),
        ("quadratic1000", 1000, 688),
        ("50", 50, 50),
        ("10,15,25", 50, 50),
        ("ddim50", 50, 50),
        ("trailing48", 48, 48),
        ("all", 1000, 1000),
    ],
)
def test_what_was_asked_for_can_be_told_from_what_is_given(spec: str, asked: int, given: int) -> None:
    assert (count_in_spec(1000, spec), len(kept_timesteps(1000, spec))) == (asked, given)


def test_ddim_of_diffusers_knows_trailing_timesteps_where_their_number_divides_t() -> None:
    """What docs/equations.md says of it: it goes back by T // S, whatever it was told to visit."""
    for count in (10, 30, 40, 50, 60, 250, 300, 333):
        scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
        scheduler.set_timesteps(count)
        visited = scheduler.timesteps.tolist()
        wrong = sum(t - 1000 // count != after for t, after in pairwise(visited))
        assert (wrong == 0) == (1000 % count == 0)
        assert count != 30 or wrong == 10
        assert count != 60 or visited[-1] - 1000 // count == 0  # it should be -1, clean data
