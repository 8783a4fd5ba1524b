"""Objectives against float64 references written from the equations."""

import pytest

from trainer.diffusion.objectives import Objective
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.schedules import make_betas


@pytest.mark.parametrize(
    ("prediction", "variance", "loss", "message"),
    [
        ("eps", "learned", "mse", "gives no gradient to variance='learned'"),
        ("mu", "learned-range", "mse", "gives no gradient to variance='learned-range'"),
        ("eps", "learned", "hybrid", "needs variance='learned-range'"),
        ("eps", "small", "hybrid", "needs variance='learned-range'"),
        ("noise", "small", "mse", "prediction='noise': must be one of eps, x0, mu, v"),
        ("eps", "tiny", "mse", "variance='tiny': must be one of small, large, learned, learned-range"),
        ("eps", "small", "mae", "loss='mae': must be one of mse, bound, hybrid"),
    ],
)
def test_combinations_without_a_meaning_are_refused(prediction: str, variance: str, loss: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(GaussianDiffusion(make_betas("linear", 10)), prediction=prediction, variance=variance, loss=loss)
