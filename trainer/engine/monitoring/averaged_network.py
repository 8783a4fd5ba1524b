"""The averaged weights of a run that trains, as a network that samples are drawn from."""

from trainer.config import Config
from trainer.engine.build import build_trained
from trainer.engine.state.train_state import TrainState
from trainer.sampling.conditioned import ConditionedNetwork
from trainer.sampling.request import ReverseRequest


def averaged_network(config: Config, state: TrainState, request: ReverseRequest) -> ConditionedNetwork:
    """The main network with its averaged weights, whole on every rank, for this request. Collective."""
    device = state.strategy.device
    return ConditionedNetwork(
        objective=state.objective,
        network=build_trained(config, state.main.average(), device),
        model=config.model,
        request=request,
        device=device,
    )
