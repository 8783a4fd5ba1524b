"""DDPM (Ho et al. 2020), Improved DDPM (Nichol & Dhariwal 2021) and DDIM (Song et al. 2021)."""
