"""What counting costs a server: CPU time of the engine with and without counts, in pairs.

    OMP_NUM_THREADS=1 python dev/serving_overhead.py runs/demo/align/model
    OMP_NUM_THREADS=1 python dev/serving_overhead.py runs/demo/align/model --log-probs    # as with serve --requests

Each pair answers the same prompts, 16 at a time, once with the hooks and once without, in turns. HTTP, which costs the
server as much again, is left out: of a whole server's time the share is smaller.
"""

import argparse
import asyncio
import statistics
import time

from deepseek_cli.benchmarks.serving import make_prompts
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.user_text import encode, protect
from deepseek_serving.openai_endpoint.engine import Engine, Limits
from deepseek_serving.openai_endpoint.sampling import SamplingSettings


async def answer_all(engine: Engine, prompts: list[list[int]], num_tokens: int) -> None:
    """Greedy answers to all prompts, 16 at a time."""
    places = asyncio.Semaphore(16)

    async def answer(ids: list[int]) -> None:
        async with places:
            generation = engine.submit(ids, SamplingSettings(0, 0.0), num_tokens)
            async for _ in generation.tokens():
                pass
            generation.close()

    await asyncio.gather(*(answer(ids) for ids in prompts))


def time_once(engine: Engine, prompts: list[list[int]], is_counted: bool, has_log_probs: bool) -> float:
    """CPU seconds of the whole process for all prompts."""
    assert engine.routing is not None
    engine.routing.detach()
    engine._sampler.on_written = None
    if is_counted:
        engine.routing.attach()
        if has_log_probs:
            engine.keep_log_probs()
    began = time.process_time()
    asyncio.run(answer_all(engine, prompts, 48))
    engine.routing.flush()
    return time.process_time() - began


def main() -> None:
    """Print the median of the pairs' ratios with its error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--log-probs", action="store_true", help="also what --requests adds")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, attn_implementation="sdpa"), load_tokenizer(args.model)
    prompts = [encode(protect(text, tokenizer), tokenizer, add_special_tokens=True) for text in make_prompts(32)]
    ratios = []
    with Engine(model, Limits(context=1024)) as engine:
        for turn in range(args.pairs + 2):
            order = (True, False) if turn % 2 else (False, True)
            seconds = {is_counted: time_once(engine, prompts, is_counted, args.log_probs) for is_counted in order}
            if turn > 1:
                ratios.append(seconds[True] / seconds[False])
    error = 1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median
    print(
        f"CPU time with counts / without: median {statistics.median(ratios):.4f} +- {error:.4f} of {len(ratios)} pairs"
    )


if __name__ == "__main__":
    main()
