"""Where the time of our guided XL/2 step goes on the CPU, compared with the least time this machine could take.

    python benchmarks/floor.py [--pixels 256 512 1024] [--dtype bfloat16] [--layers 6]

That floor is the time of the step's multiplications at the rate of a large matrix product in the same run (and of its
memory traffic at the rate of a large copy). All layers have the same shape, so a few of them show the proportions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.profiler import profile

import measure
import step

#: What torch's operations do here. The products with gelu and of the scores are one operation, with different shapes.
GROUPS = {
    "aten::addmm": "linear layers",
    "aten::mm": "attention: weights times values",
    "aten::bmm": "attention: weights times values",
    "aten::baddbmm": "attention: scores",
    "aten::_softmax": "attention: softmax",
    "aten::copy_": "copies",
    "aten::cat": "copies",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::gelu_": "gelu",
}


def best(call: Callable[[], object], rounds: int = 9) -> float:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def floor_rates(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product of 2048 x 4608 x 1152, bytes/s of a copy."""
    a, b = torch.randn(2048, 4608).to(dtype), torch.randn(4608, 1152).to(dtype)
    big = torch.empty(2**28, dtype=torch.uint8)
    other = torch.empty_like(big)
    return 2 * 2048 * 1152 * 4608 / best(lambda: a @ b), 2 * 2**28 / best(lambda: other.copy_(big))


def work(pixels: int, layers: int, real_tokens: int) -> dict[str, float]:
    """Multiplications and additions of a guided step in linear layers and in self-attention."""
    tokens, width = (pixels // 16) ** 2, 1152
    absorbed = 2 * 2 * real_tokens * 16 * width * tokens  # of the row with text; that of the other row is constant
    linear = 2 * 2 * (4 + 8) * width * width * tokens + absorbed
    return {"linear layers": layers * linear, "self-attention": layers * 2 * 2 * 2 * width * tokens * tokens}


@torch.no_grad()
def profile_step(pixels: int, layers: int, dtype: torch.dtype) -> dict[str, object]:
    step.XL["num_layers"] = layers
    options = argparse.Namespace(pixels=pixels, batch=1, real_tokens=20)
    run = step.Step("impasto", step.build("impasto", pixels, dtype), options, dtype)
    run()
    seconds = best(run, 3)
    with profile(record_shapes=True) as found:
        run()
    tokens = (pixels // 16) ** 2
    groups: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        name = GROUPS.get(event.key, "everything else")
        if event.key == "mkldnn::_linear_pointwise":
            name = _of_product(event.input_shapes[1])
        elif event.key == "aten::mm" and tokens not in event.input_shapes[0] and tokens not in event.input_shapes[1]:
            name = "everything else"
        groups[name] = groups.get(name, 0.0) + event.self_cpu_time_total / 1e6
    total = sum(groups.values())
    shares = {name: round(spent / total, 3) for name, spent in sorted(groups.items(), key=lambda x: -x[1])}
    return {"seconds": round(seconds, 3), "shares": shares}


def _of_product(weight: list[int]) -> str:
    """The purpose of oneDNN's product with a weight [out_features, in_features]."""
    if 73 in weight:  # the channels of a head, and one for the maximum
        return "attention: scores"
    return "linear layer with gelu" if weight[0] == 4608 else "linear layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    rate, bandwidth = floor_rates(dtype)
    result: dict[str, object] = {
        "what": f"our guided XL/2 step, {options.dtype}, {options.layers} of its 28 layers, against the floor",
        "product_gigaflops": round(rate / 1e9),
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 1),
    }
    for pixels in options.pixels:
        found = profile_step(pixels, options.layers, dtype)
        floor = {name: round(flops / rate, 4) for name, flops in work(pixels, options.layers, 20).items()}
        share = sum(floor.values()) / found["seconds"]
        result[f"{pixels} px"] = {**found, "floor_seconds": floor, "share_of_the_floor": round(share, 3)}
    measure.write(f"floor-{options.dtype}", result)


if __name__ == "__main__":
    main()
