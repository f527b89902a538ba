"""What the tests of the distill stage share: small runs, and what is read back of them."""

from safetensors.torch import load_file

from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.distill import DistillRecipe, distill

CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}
KEPT = ("sequence_length", "batch_size", "logging_steps", "save_steps", "eval_bytes", "max_steps", "report_to")


def distill_settings(tiny_settings, tiny_data, teacher):
    return {
        **{key: tiny_settings[key] for key in KEPT},
        "data": str(tiny_data),
        "teacher": str(teacher),
        "student": {"n_routed_experts": 4, "hidden_size": 16},
        "learning_rate": 1e-3,
        "bias_update_speed": 0.01,
        "calibration_tokens": 256,
        "cache_top_k": 16,
    }


def run(settings, path, **change):
    return distill(build_recipe({**settings, **change}, DistillRecipe), path)


def weights(path):
    return load_file(path / "model" / "model.safetensors")


def trace(path):
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in RunFolder(path).metrics]


def losses(path):
    return [row["loss"] for row in trace(path) if "loss" in row]


def largest_difference(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
