"""The settings of `upcycle`, which trains nothing and so has no recipe file: the command's options fill them."""

import dataclasses

from deepseek_training.recipes.loading import setting


@dataclasses.dataclass(kw_only=True)
class UpcycleSettings:
    """Which dense model to make a mixture of, with how many experts."""

    model: str = setting(help="the dense model: a folder or Hub id")
    n_routed_experts: int = setting(8, help="experts of a layer, a multiple of granularity")
    num_experts_per_tok: int = setting(2, help="experts that a token uses, a multiple of granularity")
    granularity: int = setting(1, help="pieces that each copy of a feed-forward layer is cut into; divides its width")
    router_std: float = setting(0.02, help="standard deviation of the router's random rows")
    seed: int = setting(0, help="of these rows")
    data: str = setting("books", help="text on which both models are compared: embedded name, file, folder or Hub id")
    data_column: str | None = setting(None, help="column that holds the text")
    sequence_length: int = setting(256, help="tokens of a window of it")
    batch_size: int = setting(8, help="windows of a forward pass")
    eval_bytes: int | None = setting(20_000, help="bytes of its held-out part that are scored")

    def __post_init__(self) -> None:
        least = {"router_std": 0, "sequence_length": 4, "batch_size": 1, "eval_bytes": 1000}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and not value >= number:
                raise ValueError(f"{name}: got {value}, expected at least {number}")
