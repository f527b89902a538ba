"""From a large model to a small one in several cuts, each healed before the next: sizes, memory and hours.

Published experience is that a cut of half the parameters can be healed and one to a twentieth can not (Minitron,
SlimQwen). `plan_halvings` interpolates every size geometrically; each model is a slice of the one before.

    python -m deepseek_training.compress.halving 154b 7.7b --rounds 4

prints the plan of two presets: counted on the meta device, the rest arithmetic. It says nothing of quality.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from deepseek_training.compress.student_config import CUT, obstacles_to_shrink
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters

# What a size is a multiple of, where hardware asks for it.
_MULTIPLES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 8}
_MULTIPLES.update({"q_lora_rank": 64, "kv_lora_rank": 64})
_ADAMW_BYTES, _BF16_BYTES = 16, 2


@dataclasses.dataclass(frozen=True)
class Round:
    """One cut and its healing.

    Attributes:
        config: The student's.
        parameters: Its parameters.
        active: Of these, the most that a token uses.
        memory_gib: Weights, gradients and AdamW's moments of the student in fp32, and the teacher's weights in bf16.
        gpu_hours: For the tokens of the round, at the stated throughput.
    """

    config: DeepseekConfig
    parameters: int
    active: float
    memory_gib: float
    gpu_hours: float


def plan_halvings(
    teacher: DeepseekConfig,
    student: DeepseekConfig,
    num_rounds: int,
    *,
    tokens: float,
    flops_per_second: float,
    multiples: Mapping[str, int] = _MULTIPLES,
) -> list[Round]:
    """Return the rounds from a teacher to a student; each round's teacher is the model of the round before.

    A token costs six FLOPs per active parameter of the student and two of its teacher's.

    Args:
        teacher: The largest model's configuration.
        student: The smallest one's.
        num_rounds: How many cuts.
        tokens: Trained on in each round.
        flops_per_second: What one GPU computes of these.
        multiples: Of what a size between is a multiple; a size that is not named may be any number.

    Raises:
        ValueError: The student is not a slice of the teacher, or there is no round.
    """
    if num_rounds < 1:
        raise ValueError(f"rounds: got {num_rounds}, expected at least 1")
    obstacles = obstacles_to_shrink(teacher, student)
    if obstacles:
        raise ValueError(f"rounds: this student is not a slice of the teacher: {'; '.join(obstacles)}")
    rounds: list[Round] = []
    before = count_parameters(teacher)
    for number in range(1, num_rounds + 1):
        config = student if number == num_rounds else _between(teacher, student, number / num_rounds, multiples)
        count = count_parameters(config)
        flops = tokens * (6 * count.active + 2 * before.active)
        num_bytes = _ADAMW_BYTES * count.total + _BF16_BYTES * before.total
        hours = flops / flops_per_second / 3600
        rounds.append(Round(config, count.total, count.active, num_bytes / 2**30, hours))
        before = count
    return rounds


def _between(
    teacher: DeepseekConfig, student: DeepseekConfig, share: float, multiples: Mapping[str, int]
) -> DeepseekConfig:
    """A configuration so far on the way; never smaller than the student's in any size."""
    settings = {}
    for name in (*CUT, "min_experts_per_tok"):
        large, small = getattr(teacher, name), getattr(student, name)
        if large is None or small is None or large == small:
            continue
        size = large * (small / large) ** share
        multiple = multiples.get(name, 1)
        settings[name] = min(max(round(size / multiple) * multiple, small), large)
    shared = {name: value for name, value in student.to_dict().items() if name not in settings}
    shared["target_experts_per_tok"] = None
    return DeepseekConfig.from_dict({**shared, **settings})


def as_markdown(teacher: DeepseekConfig, rounds: list[Round]) -> str:
    """Return the rounds as a table.

    Args:
        teacher: The largest model's configuration.
        rounds: From `plan_halvings`.
    """
    count = count_parameters(teacher)
    rows = ["| round | parameters | active | hidden | layers | heads | experts | state, GiB | GPU hours |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, (config, total, active, memory, hours) in enumerate(
        [(teacher, count.total, count.active, None, None)]
        + [(one.config, one.parameters, one.active, one.memory_gib, one.gpu_hours) for one in rounds]
    ):
        sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.n_routed_experts)
        cost = ("", "") if memory is None else (f"{memory:,.0f}", f"{hours:,.0f}")
        cells = [str(number), f"{total / 1e9:.1f} B", f"{active / 1e9:.1f} B", *map(str, sizes), *cost]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(rows)


def main() -> None:
    """Print the plan of two presets."""
    parser = argparse.ArgumentParser(description="Plan several cuts from one preset to another.")
    parser.add_argument("teacher", help="preset of the largest model")
    parser.add_argument("student", help="preset of the smallest one")
    parser.add_argument("--rounds", type=int, default=4, help="how many cuts (default: 4)")
    parser.add_argument("--tokens", type=float, default=1e11, help="tokens of each round (default: 1e11)")
    parser.add_argument(
        "--tflops", type=float, default=250.0, help="TFLOP/s of one GPU that are reached, an assumption (default: 250)"
    )
    args = parser.parse_args()
    teacher, student = (DeepseekConfig.from_preset(name) for name in (args.teacher, args.student))
    rounds = plan_halvings(teacher, student, args.rounds, tokens=args.tokens, flops_per_second=args.tflops * 1e12)
    print(as_markdown(teacher, rounds))


if __name__ == "__main__":
    main()
