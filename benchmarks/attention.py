"""``nn.attention`` on the CPU against torch's own attention, at the sizes of XL/2: seconds and errors.

python benchmarks/attention.py [--tokens 256 1024 4096] [--dtype bfloat16] [--rounds 5]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import measure
from impasto.nn import attention as seam
from impasto.nn.backends import tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result: dict[str, object] = {"what": f"attention of 2 x 16 heads of 72, {options.dtype}"}
    for tokens in options.tokens:
        torch.manual_seed(0)
        qkv = torch.randn(2, tokens, 3 * 16 * 72).to(getattr(torch, options.dtype)).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (16, 72)).transpose(1, 2) for x in qkv)
        calls = {
            "impasto": lambda q=query, k=key, v=value: seam.attention(q, k, v),
            "softmax tiles": lambda q=query, k=key, v=value: tiles._softmax_tiles(q, k, v, 72**-0.5),
            "torch": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
        }
        if options.dtype == "bfloat16":
            calls["sigmoid tiles"] = lambda q=query, k=key, v=value: tiles._sigmoid_tiles(q, k, v, 72**-0.5)[0]
        with torch.no_grad():
            outputs = {name: call() for name, call in calls.items()}
            seconds = measure.in_turns(calls, options.rounds)
            errors = {}
            if tokens <= 1024:
                exact = seam.attention_formula(query, key, value)
                errors = {name: measure.relative_error(out, exact) for name, out in outputs.items()}
        result[str(tokens)] = {**measure.compared(seconds), "distance_from_float64": errors}
    measure.write(f"attention-{options.dtype}", result)


if __name__ == "__main__":
    main()
