"""Count what fine-tuning with experts in 4 bits takes, for released models: the table of docs/finetune_any_moe.md.

    python dev/finetune_memory.py

The count is `deepseek_cli.benchmarks.finetune_count`'s; ``whole_model_on_gpu`` beside it measures the same on a GPU.
"""

from deepseek_cli.benchmarks.finetune_count import GIB, PARTS, count, released_models

# A tenth of a card is left for what is not counted.
CARDS, USABLE = (12, 16, 24, 32, 48, 80), 0.9


def main() -> None:
    """Print the table."""
    titles = ("model", "parameters", *PARTS, "sum, GiB", "fits on")
    print("| " + " | ".join(titles) + " |")
    print("| " + " | ".join(["---"] * len(titles)) + " |")
    for name, config in released_models().items():
        parameters, parts = count(config, name)
        card = next(card for card in CARDS if sum(parts) <= USABLE * card * GIB)
        cells = " | ".join(f"{part / GIB:.2f}" for part in (*parts, sum(parts)))
        print(f"| {name} | {parameters / 1e9:.2f} B | {cells} | {card} GiB |")


if __name__ == "__main__":
    main()
