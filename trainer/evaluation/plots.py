"""Plots of curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def save_curves(path: Path, rows: Sequence[dict[str, float]], timesteps: int) -> None:
    """The bound's terms over t, and figure 5 of Ho et al. 2020: distortion over t, rate over t, distortion over rate.

    rows: as returned by `bits_per_dim.rows`; timesteps: T of the process that the network was trained on.
    """
    t = [row["t"] for row in rows]
    rate = [row["rate_bits_per_dim"] for row in rows]
    distortion = [row["distortion_rmse_255"] for row in rows]
    reverse_steps = [timesteps - value for value in t]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    axes[0].plot(t, [row["bits_per_dim"] for row in rows])
    axes[0].set(xlabel="t", ylabel="L_t (bits/dim)", yscale="log", title="terms of the bound")
    axes[1].plot(reverse_steps, distortion)
    axes[1].set(xlabel="reverse process steps (T - t)", ylabel="distortion (RMSE, 0..255)", title="distortion")
    axes[2].plot(reverse_steps, rate)
    axes[2].set(xlabel="reverse process steps (T - t)", ylabel="rate (bits/dim)", title="rate")
    axes[3].plot(rate, distortion)
    axes[3].set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE, 0..255)", title="rate-distortion")
    figure.tight_layout()
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)
