"""``nn.attention`` on the CPU against torch's own attention, at the sizes of XL/2: seconds and errors.

python benchmarks/attention.py [--tokens 256 1024 4096] [--keys 20] [--heads 16 --channels 72] [--dtype bfloat16]

``--keys``: of a text; without it, image tokens attend to each other.
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
    parser.add_argument("--keys", type=int)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--channels", type=int, default=72)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    heads, channels = options.heads, options.channels
    keys = "as many keys" if options.keys is None else f"{options.keys} keys"
    result: dict[str, object] = {"what": f"attention of 2 x {heads} heads of {channels} to {keys}, {options.dtype}"}
    for tokens in options.tokens:
        torch.manual_seed(0)
        qkv = torch.randn(2, tokens, 3 * heads * channels).to(getattr(torch, options.dtype)).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (heads, channels)).transpose(1, 2) for x in qkv)
        key, value = key[:, :, : options.keys], value[:, :, : options.keys]
        calls = {
            "impasto": lambda q=query, k=key, v=value: seam.attention(q, k, v),
            "softmax tiles": lambda q=query, k=key, v=value: tiles._softmax_tiles(q, k, v, channels**-0.5),
            "torch": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
        }
        if options.dtype == "bfloat16":
            calls["sigmoid tiles"] = lambda q=query, k=key, v=value: tiles._sigmoid_tiles(q, k, v, channels**-0.5)[0]
        with torch.no_grad():
            outputs = {name: call() for name, call in calls.items()}
            seconds = measure.in_turns(calls, options.rounds)
            errors = {}
            if tokens <= 1024:
                exact = seam.attention_formula(query, key, value)
                errors = {name: measure.relative_error(out, exact) for name, out in outputs.items()}
        result[str(tokens)] = {**measure.compared(seconds), "distance_from_float64": errors}
    kind = f"{channels}-channels" + ("" if options.keys is None else f"-{options.keys}-keys")
    measure.write(f"attention-{kind}-{options.dtype}", result)


if __name__ == "__main__":
    main()
