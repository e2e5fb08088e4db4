"""The settings of a run, checked by pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...checks import nearest, shown
from ..optimizers.schedule import Kind, share

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _not_empty(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] >= ends[1]:
        raise ValueError(f"it goes from the first to below the second; {ends} is empty")
    return ends


#: Timesteps from the first to below the second.
TimestepRange = Annotated[tuple[Annotated[int, Field(ge=0)], Count], AfterValidator(_not_empty)]


class Section(BaseModel):
    """A section of a configuration: unknown keys are errors, and values do not change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        unknown = [key for key in given if key not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            hint = nearest(unknown[0], cls.model_fields, f"there are {', '.join(cls.model_fields)}")
            raise ValueError(f"there is no {shown(unknown[0])} here{hint}")
        return given


class OptimizerSettings(Section):
    """How parameters are updated.

    Attributes:
        name: ``muon`` for the matrices inside blocks and AdamW for the rest; others for everything.
        rate: the highest learning rate, as it is used: nothing rescales it.
        rates: other highest rates, by patterns of names: {"text_encoder.*": 1e-5}; the first that matches counts. Not
            of ``prodigy``.
        weight_decay: not of vectors.
        betas: of the first and the second moments; with ``came``, also of the confidence.
        eps: not of ``came``, which has its own.
    """

    name: Literal["adamw", "muon", "came", "prodigy", "adamw-8bit"] = "adamw"
    rate: Positive = 1e-4
    rates: dict[str, NotNegative] = {}
    weight_decay: NotNegative = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.9, 0.999)
    eps: NotNegative = 1e-8

    @model_validator(mode="after")
    def _used(self) -> OptimizerSettings:
        counts = (2, 3) if self.name == "came" else (2,)
        if len(self.betas) not in counts:
            raise ValueError(f"{self.name} has {' or '.join(map(str, counts))} betas, not {len(self.betas)}")
        if self.name == "came" and self.eps != type(self).model_fields["eps"].default:
            raise ValueError("eps is not one of came's settings; leave it out")
        if self.name == "prodigy" and self.rates:
            raise ValueError("prodigy has one rate for everything; leave rates out")
        return self


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
        best: a value that validation or checks measure, or ``loss``; the checkpoint with the lowest (or highest) is
            kept, too.
        result: the state that is exported at the end: the last one, or the best one.
    """

    every: Count = 1000
    keep: Count = 2
    best: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"
    result: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _best_is_known(self) -> CheckpointSettings:
        if self.result == "best" and self.best is None:
            raise ValueError("result: best needs the value by which a checkpoint is the best; give best")
        return self


class GuardSettings(Section):
    """Which steps are skipped; see ``guard.Guard``. A skipped step changes nothing, and is logged and counted.

    Attributes:
        spike: a loss, or a norm of the gradient, of more than so many times its median over the last ``window`` steps;
            0 for any. At batch sizes of a few images, losses differ by more than that from step to step.
        most_in_a_row: this many steps in a row that are not finite end the run with an error.
    """

    spike: Annotated[float, Field(ge=0)] = 20.0
    window: Annotated[int, Field(ge=10)] = 200
    most_in_a_row: Count = 20


class ReportSettings(Section):
    """What is shown in addition to ``log.jsonl``.

    Attributes:
        progress: a bar with the time left, in a terminal.
        tensorboard: in the folder ``tensorboard`` of the run.
        wandb: the project at Weights & Biases.
        peak_flops: operations per second of one device, for its utilization; those of known GPUs need not be given.
    """

    progress: bool = True
    tensorboard: bool = False
    wandb: str | None = None
    peak_flops: Positive | None = None


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
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    micro_batch: Count | None = None
    clip: NotNegative = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    checkpoints: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    report: ReportSettings = ReportSettings()
    log_every: Count = 50

    def share(self, step: int) -> float:
        """The learning rate of a step as a share of the highest."""
        s = self.schedule
        return share(step, self.steps, s.kind, s.warmup, s.decay_share, s.floor)


def problems(error: ValidationError) -> str:
    """What pydantic found, in one line: the first problem, with its key, and how many more there are."""
    found = error.errors(include_url=False)
    first = found[0]
    inside = first["loc"][:1] + first["loc"][2:] if first["loc"][:1] == ("objective",) else first["loc"]  # not its kind
    place = ".".join(str(part) for part in inside)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] not in ("value_error", "missing"):
        message = f"must be {message}, not {shown(first['input'])}" if "should be" in first["msg"] else first["msg"]
    if first["type"] == "missing":
        message = "must be given"
    if first["type"] == "string_type" and not isinstance(first["input"], dict | list):
        message = f"must be a text, not {shown(first['input'])}; put it in double quotes, also in --set"
    if first["type"] == "union_tag_invalid":  # the objectives are the only union
        place, tag, kinds = f"{place}.kind", first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "")
        message = f"must be one of {kinds}, not {shown(tag)}{nearest(tag, kinds.split(', '))}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place or 'the configuration'}: {message}{more}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys, such as "optimizer.rate", whose values differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**one, **other}:
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found
