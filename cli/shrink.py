"""``deepseek-moe shrink``: a smaller model cut out of a larger one."""

import argparse

HELP = "Cut a smaller model out of a larger one: experts, channels, heads, layers; of other families experts."
EXAMPLES = """
  deepseek-moe shrink runs/demo/pretrain/model runs/half --set n_routed_experts=8 --dry-run
  deepseek-moe shrink runs/demo/pretrain/model runs/half --set n_routed_experts=8
  deepseek-moe shrink runs/demo/pretrain/model runs/third --set hidden_size=96 n_routed_experts=6 num_experts_per_tok=3
  deepseek-moe shrink runs/first/model runs/frequent --set n_routed_experts=4 --experts-by frequency --data medicine

distill or adapt heal what was cut.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from deepseek_training.recipes.loading import add_setting_arguments, setting_helps
    from deepseek_training.recipes.shrink import ShrinkSettings

    helps = setting_helps(ShrinkSettings)
    parser.add_argument("model", metavar="MODEL", help=helps["model"])
    parser.add_argument("output", metavar="OUT", help="run folder; the smaller model lies in its model/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=helps["student"], dest="student"
    )
    add_setting_arguments(parser, ShrinkSettings, but=("model", "student"))
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print what would be cut, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Cut and print what it cost."""
    from deepseek_training.recipes.loading import build_recipe, collect_overrides, parse_value
    from deepseek_training.recipes.shrink import ShrinkSettings

    if not args.student:
        raise ValueError("--set: got nothing, expected at least one KEY=VALUE, such as n_routed_experts=8")
    student = {}
    for word in args.student:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--set: got {word!r}, expected KEY=VALUE")
        student[key] = parse_value(f"set {key}", value)
    given = {"model": args.model, "student": student, **collect_overrides(args)}
    settings = build_recipe(given, ShrinkSettings, source="shrink")

    from deepseek_training.stages.shrink import shrink

    summary = shrink(settings, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    before, after = summary.results
    print(summary.details["cut"])
    print(f"{after.dataset}: {before.value:.4f} -> {after.value:.4f} +- {after.stderr:.4f} bits per byte, not healed")
    print(f"model in {args.output}/model after {summary.seconds:.0f} s")
    return 0
