"""Greedy text of a checkpoint by vLLM on a CPU; runs in the environment that has vLLM, without this package.

    PYTHON_OF_VLLM -P vllm_generate.py MODEL REQUEST.json ANSWER.json

The request holds `prompts` (token ids) and `max_tokens`; the answer the tokens and their log-probabilities, and the
seconds that all took. The two conditions under which it can be compared: vLLM 0.32's MLA on CPUs wants latents of 512
and rotated keys of 64 numbers, and its own rotary operator is off in fp32 there, hence `custom_ops`.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main(model: str, request: str, answer: str) -> None:
    """Run all prompts and write the answer."""
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=asked["max_model_len"],
        max_num_seqs=asked.get("max_num_seqs", 64),
        enable_prefix_caching=False,
        compilation_config={"custom_ops": ["none"]} if asked.get("is_exact", True) else None,
    )
    settings = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], logprobs=1, detokenize=False)
    began = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
    seconds = time.perf_counter() - began
    found = [
        {
            "tokens": list(one.outputs[0].token_ids),
            "logps": [
                step[token].logprob
                for step, token in zip(one.outputs[0].logprobs, one.outputs[0].token_ids, strict=True)
            ],
        }
        for one in outputs
    ]
    Path(answer).write_text(json.dumps({"answers": found, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:4])
