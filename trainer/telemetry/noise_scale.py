"""The gradient noise scale (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1)."""

from typing import NamedTuple


class GradientNoise(NamedTuple):
    """Unbiased estimates from one step: |G|^2, the squared norm of the true gradient, and tr(Sigma), the variance of
    the gradient of one image. Both may be negative in a single step; averages over many steps are not.
    """

    square: float
    variance: float

    @classmethod
    def estimate(
        cls, *, small_square: float, small_batch: int, large_square: float, large_batch: int
    ) -> "GradientNoise":
        """From squared gradient norms of a small and a large batch, and the batches' sizes in images.

        E|G_B|^2 = |G|^2 + tr(Sigma) / B (equation A.1), solved for both unknowns.
        """
        if not 0 < small_batch < large_batch:
            raise ValueError(f"small_batch={small_batch}: must be positive and less than large_batch={large_batch}")
        square = (large_batch * large_square - small_batch * small_square) / (large_batch - small_batch)
        variance = (small_square - large_square) / (1 / small_batch - 1 / large_batch)
        return cls(square, variance)
