"""The attention seam on the CPU in bfloat16 against torch's own, at the sizes of XL/2: milliseconds and errors.

python benchmarks/attention.py [--tokens 256 1024 4096] [--rounds 5]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import measure
from impasto.nn import attention as seam
from impasto.nn import attention_tiles as tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result: dict[str, object] = {"what": "attention of 2 x 16 heads of 72, bfloat16"}
    for tokens in options.tokens:
        torch.manual_seed(0)
        qkv = torch.randn(2, tokens, 3 * 16 * 72).bfloat16().chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (16, 72)).transpose(1, 2) for x in qkv)
        calls = {
            "impasto": lambda q=query, k=key, v=value: seam.attention(q, k, v),
            "softmax tiles": lambda q=query, k=key, v=value: tiles._softmax_tiles(q, k, v, 72**-0.5),
            "sigmoid tiles": lambda q=query, k=key, v=value: tiles._sigmoid_tiles(q, k, v, 72**-0.5)[0],
            "torch": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
        }
        with torch.no_grad():
            outputs = {name: call() for name, call in calls.items()}
            seconds = measure.in_turns(calls, options.rounds)
            errors = {}
            if tokens <= 1024:
                exact = seam.attention_formula(query, key, value)
                errors = {name: measure.relative_error(out, exact) for name, out in outputs.items()}
        result[str(tokens)] = {**measure.compared(seconds), "distance_from_float64": errors}
    measure.write("attention-bfloat16", result)


if __name__ == "__main__":
    main()
