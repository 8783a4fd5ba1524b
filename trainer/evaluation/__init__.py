"""Evaluation of a trained network: samples, likelihood, feature metrics, the paper's figures. Built on the engine."""
