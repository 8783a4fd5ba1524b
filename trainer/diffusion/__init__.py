"""Families of diffusion models: what is learned and how, keyed noise, and the contract with networks and samplers."""
