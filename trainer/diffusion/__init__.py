"""Schedules, the diffusion process and samplers: pure tensor mathematics."""
