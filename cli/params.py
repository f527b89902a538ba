"""``deepseek-moe params``: parameters by part and FLOPs per token, of a preset, a recipe, a run or a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

HELP = "Print a model's parameters by part, its active share and its FLOPs per token."
EXAMPLES = """
  deepseek-moe params 154b
  deepseek-moe params 154b --experts-per-token 10 --context-length 32768
  deepseek-moe params nano --n-routed-experts 64 --num-experts-per-tok 4 --min-experts-per-tok null
  deepseek-moe params pretrain-demo --vocab-size 4096
  deepseek-moe params runs/demo/align

--setting value replaces a setting of the preset's or recipe's model, or of the recipe.
"""
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", help="a preset (154b, 7.7b, nano, debug), a recipe's name or file, a run folder or a checkpoint"
    )
    parser.add_argument("--experts-per-token", type=float, help="routed experts per token (default: the most)")
    parser.add_argument("--context-length", type=int, default=4096, help="context that attention is counted for")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from deepseek_training.recipes.loading import parse_overrides

    if args.context_length < 1:
        raise ValueError(f"--context-length: got {args.context_length}, expected at least 1")
    config = load_config(args.model, parse_overrides(args.settings))
    if not hasattr(config, "min_experts_per_tok"):
        print(_format_other(args, config))
        return 0
    from modeling_deepseek.parameter_count import count_parameters

    wanted, low = args.experts_per_token, config.min_experts_per_tok or config.num_experts_per_tok
    if wanted is not None and not low <= wanted <= config.num_experts_per_tok:
        raise ValueError(f"--experts-per-token: got {wanted}, expected {low} to {config.num_experts_per_tok}")
    print(format_count(args.model, count_parameters(config, wanted), args.context_length))
    return 0


def load_config(name: str, settings: dict[str, Any]) -> Any:
    """Return the configuration of a preset, recipe, run or checkpoint.

    Args:
        name: A preset's or recipe's name, or a path.
        settings: What replaces its settings.

    Raises:
        FileNotFoundError: It is none of these.
        ValueError: A setting is unknown or refused.
    """
    from deepseek_training.recipes.loading import list_recipes
    from modeling_deepseek import DeepseekConfig
    from modeling_deepseek.presets import PRESETS

    path = Path(name)
    if name in PRESETS:
        return DeepseekConfig.from_preset(name, **settings)
    if path.is_file() or (not path.exists() and name in list_recipes()):
        return _config_of_recipe(name, settings)
    if path.is_dir():
        return _config_of_folder(path, settings)
    raise FileNotFoundError(
        f"model: got {name!r}, expected a preset ({', '.join(PRESETS)}), a recipe ({', '.join(list_recipes())} or a "
        "YAML file), a run folder or a checkpoint"
    )


def _config_of_folder(path: Path, settings: dict[str, Any]) -> Any:
    from deepseek_records.run_folder import RECIPE_FILE
    from deepseek_records.stages import read_stages

    if (path / "config.json").is_file():
        return _config_of_checkpoint(path, settings)
    if (path / "model" / "config.json").is_file():
        return _config_of_checkpoint(path / "model", settings)
    if (path / "adapter_config.json").is_file():
        from deepseek_records.loading import base_of_adapter

        return load_config(base_of_adapter(str(path)), settings)
    if (path / RECIPE_FILE).is_file():
        return _config_of_recipe(str(path / RECIPE_FILE), settings)
    makers = [stage for stage in read_stages(path).values() if stage.has_model]
    if not makers:
        raise FileNotFoundError(f"model: got {path}, expected a folder with a config.json or a run that made a model")
    return _config_of_checkpoint(makers[-1].run.model_path, settings)


def _config_of_checkpoint(path: Path, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    from deepseek_records.json_files import read_object
    from deepseek_records.loading import first_line
    from modeling_deepseek import DeepseekConfig

    kind = str(read_object(path / "config.json", "model").get("model_type"))
    reader = DeepseekConfig if kind.startswith("deepseek") else AutoConfig
    try:
        return reader.from_pretrained(path, **settings)
    except OSError as error:
        raise ValueError(f"model: {path / 'config.json'} is refused ({first_line(error)})") from None
    except ValueError as error:
        if reader is DeepseekConfig:
            raise
        reason = first_line(error).split(". ")[0]  # transformers' is a paragraph
        raise ValueError(f"model: {path / 'config.json'} is refused ({reason})") from None


def _config_of_recipe(name: str, settings: dict[str, Any]) -> Any:
    """The model that a recipe trains: a new one of `pretrain`, else the one that it names."""
    import dataclasses

    from deepseek_training.recipes.loading import find_recipe, load_recipe, read_settings
    from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe

    content = read_settings(find_recipe(name))
    if isinstance(content.get("model"), str):
        model = settings.pop("model", content["model"])
        return load_config(str(model), settings)
    own = {field.name for field in dataclasses.fields(PretrainRecipe)}
    recipe = load_recipe(name, PretrainRecipe, {key: value for key, value in settings.items() if key in own})
    from deepseek_training.trainer.new_model import model_config

    recipe.model.update({key: value for key, value in settings.items() if key not in own})
    return model_config(recipe, vocab_size=recipe.vocab_size)


def _format_other(args: argparse.Namespace, config: Any) -> str:
    """The size of a model of another family, whose parts are not told apart."""
    import torch
    from transformers import AutoModelForCausalLM

    from deepseek_training.launch.plan import measure_size

    if args.experts_per_token is not None:
        raise ValueError(f"--experts-per-token: got {args.experts_per_token}, expected a model of ours")
    with torch.device("meta"):
        size = measure_size(AutoModelForCausalLM.from_config(config))
    return (
        f"{args.model}: {size.total:,} parameters, {size.active:,} active per token ({size.active / size.total:.2%})"
    )


def format_count(name: str, count: Any, context_length: int) -> str:
    """Return the table as text.

    Args:
        name: What was counted.
        count: A `ParameterCount`.
        context_length: Tokens in the context.
    """
    lines = [f"{name}: {count.mean_experts_per_tok:g} routed experts per token", ""]
    lines.append(f"{'part':<20}{'parameters':>18}{'share':>9}{'active per token':>20}")
    for part, number in count.parts.items():
        lines.append(f"{part:<20}{number:>18,}{number / count.total:>9.2%}{round(count.active_parts[part]):>20,}")
    lines.append(f"{'total':<20}{count.total:>18,}{1:>9.2%}{round(count.active):>20,}")
    sparse = count.flops_per_token(context_length)
    dense = count.flops_per_token(context_length, is_dense=True)
    lines += [
        "",
        f"active per token     {count.active / count.total:.2%} of the parameters",
        f"forward FLOPs/token  {sparse:.4g} at a context of {context_length} (training: three times that)",
        f"dense equivalent     {dense:.4g}, every expert run: {1 - sparse / dense:.1%} saved",
    ]
    return "\n".join(lines)
