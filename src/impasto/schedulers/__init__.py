"""Schedulers, under the import paths of diffusers too."""

from __future__ import annotations

from typing import Any

from ..lazy import publish, resolve

_HOMES = {
    "DDIMScheduler": "schedulers.ddim:DDIMScheduler",
    "DDIMSchedulerOutput": "schedulers.ddim:DDIMSchedulerOutput",
    "DDPMScheduler": "schedulers.ddpm:DDPMScheduler",
    "DDPMSchedulerOutput": "schedulers.ddpm:DDPMSchedulerOutput",
    "DPMSolverMultistepScheduler": "schedulers.dpm_solver:DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler": "schedulers.flow_match_euler:FlowMatchEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteSchedulerOutput": "schedulers.base:SchedulerOutput",
    "LCMScheduler": "schedulers.lcm:LCMScheduler",
    "LCMSchedulerOutput": "schedulers.lcm:LCMSchedulerOutput",
    "SchedulerMixin": "schedulers.base:Scheduler",
    "SchedulerOutput": "schedulers.base:SchedulerOutput",
    "rescale_zero_terminal_snr": "schedulers.betas:rescale_zero_terminal_snr",
}
publish(
    __name__,
    _HOMES,
    "scheduling_ddim",
    "scheduling_ddpm",
    "scheduling_dpmsolver_multistep",
    "scheduling_flow_match_euler_discrete",
    "scheduling_lcm",
    "scheduling_utils",
)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
