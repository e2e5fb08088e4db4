"""Text encoding of a prompt and the empty prompt, as in the pipelines, with a full-size T5 of random weights.

    python benchmarks/text.py [--rounds 3]

diffusers passes 300 tokens for each to T5, ours only the real ones. Ours encodes the empty prompt once, so later calls
encode a prompt alone. The embeddings of real tokens are compared.
"""

from __future__ import annotations

import argparse

import torch

import image
import measure

PROMPTS = [image.PROMPT] + [f"{image.PROMPT} {word}" for word in ("desert", "golden", "sharp", "face", "hour")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pipes = image.pipelines(512, torch.bfloat16)
    prompts = {name: iter(PROMPTS * options.rounds) for name in pipes}
    given = {"impasto": {}, "diffusers": {"clean_caption": False}}

    def encode(name: str) -> tuple[torch.Tensor, ...]:
        return pipes[name].encode_prompt(next(prompts[name]), **given[name])

    first = {name: encode(name) for name in pipes}
    mask = first["diffusers"][1].bool()
    error = measure.relative_error(first["impasto"][0][mask], first["diffusers"][0][mask])
    assert error < 0.1, error
    seconds = measure.in_turns({name: lambda name=name: encode(name) for name in pipes}, options.rounds)
    what = "T5-XXL, a prompt and the empty one, bfloat16"
    measure.write("text-bfloat16", {"what": what, "difference": error, **measure.compared(seconds)})


if __name__ == "__main__":
    main()
