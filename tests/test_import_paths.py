"""Import paths of diffusers that scripts use: the same names are at the same places."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import impasto

#: Module and a name in it.
TABLE = """
callbacks:PipelineCallback callbacks:MultiPipelineCallbacks callbacks:SDCFGCutoffCallback
image_processor:VaeImageProcessor image_processor:PixArtImageProcessor models:AutoencoderKL
models:PixArtTransformer2DModel models:Transformer2DModel models:GlmImageTransformer2DModel models:ModelMixin
models.autoencoders:AutoencoderKL models.autoencoders.autoencoder_kl:AutoencoderKL
models.autoencoders.vae:DecoderOutput models.autoencoders.vae:DiagonalGaussianDistribution
models.modeling_outputs:Transformer2DModelOutput models.modeling_outputs:AutoencoderKLOutput
models.modeling_utils:ModelMixin models.transformers:PixArtTransformer2DModel models.transformers:Transformer2DModel
models.transformers.pixart_transformer_2d:PixArtTransformer2DModel
models.transformers.transformer_2d:Transformer2DModel
models.transformers.transformer_glm_image:GlmImageTransformer2DModel pipelines:PixArtAlphaPipeline
pipelines:PixArtSigmaPipeline pipelines:ImagePipelineOutput pipelines:GlmImagePipeline
pipelines.glm_image:GlmImagePipeline pipelines.glm_image.pipeline_glm_image:GlmImagePipeline
pipelines.pipeline_utils:ImagePipelineOutput pipelines.pixart_alpha:PixArtAlphaPipeline
pipelines.pixart_alpha:PixArtSigmaPipeline pipelines.pixart_alpha.pipeline_pixart_alpha:PixArtAlphaPipeline
pipelines.pixart_alpha.pipeline_pixart_alpha:ASPECT_RATIO_256_BIN
pipelines.pixart_alpha.pipeline_pixart_alpha:ASPECT_RATIO_512_BIN
pipelines.pixart_alpha.pipeline_pixart_alpha:ASPECT_RATIO_1024_BIN
pipelines.pixart_alpha.pipeline_pixart_sigma:PixArtSigmaPipeline
pipelines.pixart_alpha.pipeline_pixart_sigma:ASPECT_RATIO_2048_BIN schedulers:DDIMScheduler schedulers:DDPMScheduler
schedulers:DPMSolverMultistepScheduler schedulers:LCMScheduler schedulers:FlowMatchEulerDiscreteScheduler
schedulers:SchedulerMixin schedulers.scheduling_ddim:DDIMScheduler schedulers.scheduling_ddim:DDIMSchedulerOutput
schedulers.scheduling_ddim:rescale_zero_terminal_snr schedulers.scheduling_ddpm:DDPMScheduler
schedulers.scheduling_dpmsolver_multistep:DPMSolverMultistepScheduler
schedulers.scheduling_flow_match_euler_discrete:FlowMatchEulerDiscreteScheduler
schedulers.scheduling_flow_match_euler_discrete:FlowMatchEulerDiscreteSchedulerOutput
schedulers.scheduling_lcm:LCMScheduler schedulers.scheduling_utils:SchedulerMixin
schedulers.scheduling_utils:SchedulerOutput utils:load_image utils:make_image_grid utils:export_to_gif
utils:BaseOutput utils:logging utils:numpy_to_pil utils:pt_to_pil utils:PIL_INTERPOLATION utils:is_torch_available
utils:is_accelerate_available utils:CONFIG_NAME utils:WEIGHTS_NAME utils:SAFETENSORS_WEIGHTS_NAME
utils.export_utils:export_to_gif utils.loading_utils:load_image utils.logging:get_logger utils.outputs:BaseOutput
utils.pil_utils:make_image_grid utils.torch_utils:randn_tensor utils.torch_utils:is_compiled_module
"""
PATHS = TABLE.split()


@pytest.mark.parametrize("path", PATHS)
def test_the_same_path_leads_to_a_thing_of_the_same_name(path: str) -> None:
    module, name = path.split(":")
    theirs = getattr(importlib.import_module(f"diffusers.{module}"), name)
    ours = getattr(importlib.import_module(f"impasto.{module}"), name)
    if isinstance(theirs, type):
        assert isinstance(ours, type)
        assert ours.__module__.startswith("impasto.")
        if hasattr(impasto, name):
            assert getattr(impasto, name) is ours
    elif isinstance(theirs, str | dict):
        assert ours == theirs or name == "PIL_INTERPOLATION"
    else:
        assert type(ours) is type(theirs) or callable(ours)


@pytest.mark.long
def test_every_way_to_import_works_in_a_fresh_interpreter() -> None:
    lines = [
        "import impasto.models.transformers.pixart_transformer_2d as a",
        "from impasto.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline",
        "import impasto.pipelines.pixart_alpha.pipeline_pixart_sigma as b",
        "from impasto.schedulers import scheduling_ddim",
        "import impasto.schedulers.scheduling_lcm",
        "from impasto import schedulers, models, pipelines, utils, callbacks, image_processor",
        "from impasto.schedulers.scheduling_ddim import *",
        "from impasto.models.transformers import PixArtTransformer2DModel",
        "assert impasto.models.transformers.pixart_transformer_2d is a",
        "assert a.PixArtTransformer2DModel is impasto.PixArtTransformer2DModel is PixArtTransformer2DModel",
        "assert b.PixArtSigmaPipeline is impasto.PixArtSigmaPipeline",
        "assert scheduling_ddim.DDIMScheduler is schedulers.DDIMScheduler is impasto.DDIMScheduler",
        "assert GlmImagePipeline is impasto.GlmImagePipeline",
    ]
    for code in (lines[:1], lines[1:2], lines[2:3], lines[4:5], lines):
        done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


ATTRIBUTES = """
utils.load_image logging.set_verbosity_error callbacks.PipelineCallback schedulers.DDIMScheduler
image_processor.VaeImageProcessor models.transformers.PixArtTransformer2DModel pipelines.pixart_alpha
"""


@pytest.mark.long
@pytest.mark.parametrize("path", ATTRIBUTES.split())
def test_modules_are_attributes_of_the_package(path: str) -> None:
    code = f"import impasto\nimpasto.{path}\nassert '{path.split('.')[0]}' in dir(impasto)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_load_nothing_heavy() -> None:
    code = (
        "import sys, impasto.models, impasto.schedulers, impasto.pipelines, impasto.utils, impasto.utils.logging\n"
        "dir(impasto.models), impasto.utils.is_torch_available()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_that_are_nowhere() -> None:
    for module in ("models", "models.transformers", "schedulers", "schedulers.scheduling_ddim", "pipelines", "utils"):
        with pytest.raises(AttributeError, match=f"'impasto.{module}' has no attribute 'UNet'"):
            importlib.import_module(f"impasto.{module}").UNet  # noqa: B018
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"impasto.{module}.unet")
    for package in ("models", "schedulers", "pipelines", "utils"):
        listed = importlib.import_module(f"impasto.{package}")
        assert set(listed._HOMES) <= set(dir(listed))
        for name, home in listed._HOMES.items():
            if not home.startswith(":"):  # public names have a test of their own
                assert getattr(listed, name) is not None
