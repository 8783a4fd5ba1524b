"""A file of weights of torch-fidelity's Inception that nobody has published."""

import io
from pathlib import Path

import pytest
import torch

from trainer.features.fidelity import fidelity_module


def write_random_inception(path: Path) -> Path:
    """The network as it is initialised, with torch's seed 0."""
    network_class = fidelity_module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_class, "load_state_dict", lambda *_: None)
        network = network_class("random", ["2048"], feature_extractor_weights_path=empty)
    torch.save(network.state_dict(), path)
    return path
