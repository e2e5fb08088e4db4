"""A PixArt-XL/2 training step: our model and diffusers' in the same loop, in turns, with random weights.

    python benchmarks/train_step.py [--pixels 256] [--batch 2] [--dtype float32] [--layers 28] [--real-tokens 20]
        [--rounds 5] [--checkpointing] [--compiled] [--device cpu] [--only impasto]

A step is a forward pass of noisy latents and 300 text tokens, few of them real, the mean squared error of the predicted
noise, its gradients, and AdamW. With --compiled, the blocks of both are compiled. The memory is the peak above weights,
gradients and optimizer state: on a GPU the allocator's, on a CPU that of a process of its own (--only). "share of the
peak" is model-flops utilisation: three forward passes, relative to large matrix products on the same device.
"""

from __future__ import annotations

import argparse
import resource
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

import impasto
import measure
from gpu import flops, matmul_rate, synchronize

XL = {"caption_channels": 4096, "use_additional_conditions": False}


class TrainingStep:
    """One step of a library's model with its own optimizer."""

    def __init__(self, library: Any, options: argparse.Namespace, weights: dict[str, torch.Tensor] | None = None):
        torch.manual_seed(0)
        dtype, side = getattr(torch, options.dtype), options.pixels // 8
        shape = {**XL, "sample_size": side, "num_layers": options.layers}
        with torch.device(options.device):
            self.model = library.PixArtTransformer2DModel(**shape).to(dtype).train()
            if weights is not None:
                self.model.load_state_dict(weights)
        if options.checkpointing:
            self.model.enable_gradient_checkpointing()
        if options.compiled:
            for block in self.model.transformer_blocks:
                block.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        generator = torch.Generator().manual_seed(1)
        where = {"device": options.device, "dtype": dtype}
        self.latents, self.noise = torch.randn(2, options.batch, 4, side, side, generator=generator).to(**where)
        self.text = torch.randn(options.batch, 300, 4096, generator=generator).to(**where)
        self.mask = (torch.arange(300) < options.real_tokens).long().expand(options.batch, 300).to(options.device)
        self.timestep = torch.arange(options.batch, device=options.device) * 37 + 100
        self.device = options.device

    def __call__(self) -> float:
        prediction = self.model(
            self.latents,
            encoder_hidden_states=self.text,
            timestep=self.timestep,
            encoder_attention_mask=self.mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        loss = F.mse_loss(prediction[:, :4].float(), self.noise.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # what the state takes does not change
        return loss.item()

    def extra_gigabytes(self) -> float:
        """The peak of a step above what stays, in GB."""
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return (torch.cuda.max_memory_allocated() - before) / 1e9
        stays = 4 * sum(p.numel() * p.element_size() for p in self.model.parameters())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - stays / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--real-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=["impasto", "diffusers"], help="print the peak memory of one of them")
    options = parser.parse_args()
    libraries: dict[str, Any] = {"impasto": impasto, "diffusers": diffusers}

    if options.only:
        step = TrainingStep(libraries[options.only], options)
        step()
        step()
        print(f"{options.only}: {step.extra_gigabytes():.3f} GB above weights, gradients and optimizer state")
        return
    theirs = TrainingStep(diffusers, options)
    steps = {"impasto": TrainingStep(impasto, options, theirs.model.state_dict()), "diffusers": theirs}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    assert all(abs(a - b) < 1e-2 * abs(b) for a, b in zip(losses["impasto"], losses["diffusers"])), losses
    result = measure.compared(measure.in_turns(steps, options.rounds))
    work = 3 * options.batch * flops(options.pixels, options.layers, options.real_tokens) / 2  # of one image, not two
    synchronize(options.device)
    if options.device == "cuda":
        peak = matmul_rate(options.device, 8192)
        result["share_of_the_peak"] = {name: round(work / s / peak, 3) for name, s in result["median"].items()}
        result["extra_gigabytes"] = {name: round(step.extra_gigabytes(), 3) for name, step in steps.items()}
    what = f"a training step of XL/2, {options.layers} layers, {options.pixels} px, batch {options.batch}"
    details = {"dtype": options.dtype, "real tokens": options.real_tokens}
    how = [name for name in ("compiled", "checkpointing") if getattr(options, name)]
    parts = [f"train-step-{options.pixels}-{options.dtype}", f"text{options.real_tokens}", *how]
    name = "-".join([*parts, *(["gpu"] * (options.device == "cuda"))])
    measure.write(name, {"what": ", ".join([what, *how]), **details, "losses": losses, **result})


if __name__ == "__main__":
    main()
