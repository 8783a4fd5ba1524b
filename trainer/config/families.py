"""The sections [diffusion]: one class for each family, chosen by `kind`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from trainer.config.kinds import Kinds
from trainer.config.section import Section

ScheduleName = Literal["linear", "cosine", "sqrt-linear", "sigmoid", "table"]
PredictionKind = Literal["eps", "x0", "mu", "v"]
ReverseVariance = Literal["small", "large", "learned", "learned-range"]
Loss = Literal["mse", "bound", "hybrid"]


def is_learned(variance: ReverseVariance) -> bool:
    """Whether the network's output has a second half, for the variance."""
    return variance in ("learned", "learned-range")


class DiffusionConfig(Section):
    """What the section of every family has."""

    kind: str
    """The family."""

    def identity(self) -> dict[str, Any]:
        """Fields that must not change within a run: all, unless overridden."""
        return self.model_dump()

    def of_training_alone(self) -> set[str]:
        """Names of those fields that weights trained elsewhere leave open."""
        return set()

    @property
    def classifies(self) -> bool:
        """Whether the network tells the class of x_t, and draws nothing."""
        return False


class GaussianConfig(DiffusionConfig):
    """A chain of Gaussian noise (Ho et al. 2020, section 2)."""

    timesteps: int = Field(default=1000, gt=1, le=1_000_000)
    """T, the number of noise levels."""
    schedule: ScheduleName = "linear"
    """beta_t: "linear" 1e-4 to 0.02 (Ho et al. 2020; times 1000 / T), "cosine" (Nichol and Dhariwal 2021),
    "sqrt-linear", "sigmoid", or "table"."""
    betas: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    """With schedule "table": beta_t for every t."""

    @model_validator(mode="after")
    def _has_its_table(self) -> Self:
        if (self.schedule == "table") != (self.betas is not None):
            raise ValueError('schedule = "table" and betas go together')
        if self.betas is not None and len(self.betas) != self.timesteps:
            raise ValueError(f"betas has {len(self.betas)} values, timesteps is {self.timesteps}")
        return self


class DDPMConfig(GaussianConfig):
    """The forward process, what the network predicts of it, and the loss (Ho et al. 2020, table 2)."""

    kind: Literal["ddpm"] = "ddpm"
    """The family."""
    prediction: PredictionKind = "eps"
    """What the network predicts: "eps", "x0", "mu" (the posterior's mean) or "v" (Salimans and Ho 2022)."""
    variance: ReverseVariance = "small"
    """Variance of the reverse process: "small" beta~_t or "large" beta_t (section 3.2); "learned", a diagonal one, or
    "learned-range", between the two fixed ones (Nichol and Dhariwal 2021), doubles the network's output."""
    loss: Loss = "mse"
    """The "mse" of the prediction (with "eps" it is L_simple), "bound" (L, the variational bound, in bits per
    dimension), or "hybrid" (L_simple + 0.001 L_vlb; Nichol and Dhariwal 2021)."""
    timestep_sampling: Literal["uniform", "importance"] = "uniform"
    """How t is drawn: "importance" as often as its loss is large (Nichol and Dhariwal 2021, section 3.3)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.loss == "mse" and self.variance_is_learned:
            raise ValueError(f'loss = "mse" does not teach variance = "{self.variance}"; take "bound" or "hybrid"')
        if self.loss == "hybrid" and self.variance != "learned-range":
            raise ValueError('loss = "hybrid" is for variance = "learned-range"')
        return self

    @property
    def variance_is_learned(self) -> bool:
        """See `is_learned`."""
        return is_learned(self.variance)

    @override
    def identity(self) -> dict[str, Any]:
        of_sampling_alone = {"variance"} if self.loss == "mse" else set()
        return self.model_dump(exclude=of_sampling_alone)

    @override
    def of_training_alone(self) -> set[str]:
        return {"loss"} if self.variance_is_learned else {"loss", "variance"}  # learned: half of the network's output


class ClassifierConfig(GaussianConfig):
    """The class of a noisy image, for classifier guidance (Dhariwal and Nichol 2021, section 4; docs/classes.md)."""

    kind: Literal["classifier"] = "classifier"
    """The family."""

    @property
    @override
    def classifies(self) -> bool:
        return True


FAMILY_SECTIONS: Kinds[DiffusionConfig] = Kinds("diffusion", DiffusionConfig, DDPMConfig, ClassifierConfig)
