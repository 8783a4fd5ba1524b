"""DDPM (Ho et al. 2020) and Improved DDPM (Nichol and Dhariwal 2021)."""
