"""The settings of a run, checked by pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..errors import MissingDependencyError
from .optimizers.schedule import Kind, share

try:
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    raise MissingDependencyError("training needs pydantic: pip install 'impasto[train]'") from error

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of a configuration: unknown keys are errors, and values do not change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self, **values: Any) -> Any:
        """The same section with other values, checked."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})


class OptimizerSettings(Section):
    """How parameters are updated.

    Attributes:
        name: ``muon`` for the matrices inside blocks and AdamW for the rest; others for everything.
        rate: the highest learning rate, as it is used: nothing rescales it.
        rates: other highest rates, by patterns of names: {"text_encoder.*": 1e-5}; the first that matches counts.
        weight_decay: not of vectors.
    """

    name: Literal["adamw", "muon", "came", "prodigy", "adamw-8bit"] = "adamw"
    rate: Positive = 1e-4
    rates: dict[str, NotNegative] = {}
    weight_decay: NotNegative = 0.01
    betas: tuple[Share, ...] = (0.9, 0.999)
    eps: NotNegative = 1e-8


class ScheduleSettings(Section):
    """The learning rate over the steps; see ``optimizers.schedule.share``."""

    kind: Kind = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    decay_share: Share = 0.3
    floor: Share = 0.0


class CheckpointSettings(Section):
    """Which states of a run are kept.

    Attributes:
        every: steps from one to the next.
        keep: the last so many.
        best: a value that is logged with each checkpoint; the one with the lowest (or highest) is kept, too.
    """

    every: Count = 1000
    keep: Count = 2
    best: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"


class Settings(Section):
    """What the training loop needs to know.

    Attributes:
        steps: of the whole run.
        micro_batch: the most samples of a forward and backward pass; gradients add up over the batch.
        clip: the largest norm of the gradient; 0 for any.
        ema: the decay of the moving averages of the parameters, which are the result; 0 for none.
        precision: in which models compute, with float32 master weights; ``auto``: bfloat16 where it is native.
        compile: compile the objective's blocks.
        log_every: steps that a line of the log averages.
    """

    steps: Count
    seed: Annotated[int, Field(ge=0)] = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    micro_batch: Count | None = None
    clip: NotNegative = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    checkpoints: CheckpointSettings = CheckpointSettings()
    log_every: Count = 50

    def share(self, step: int) -> float:
        """The learning rate of a step as a share of the highest."""
        s = self.schedule
        return share(step, self.steps, s.kind, s.warmup, s.decay_share, s.floor)
