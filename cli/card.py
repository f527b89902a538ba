"""``deepseek-moe card``: the model card and the report of a run, from its folder alone."""

import argparse
from pathlib import Path

HELP = "Write the model card (README.md, .eval_results/) and report.html of a finished run, or a model's card."
EXAMPLES = """
  deepseek-moe card runs/demo
  deepseek-moe card runs/demo --repo-id someone/my-moe --license mit
  deepseek-moe card runs/demo/pretrain --output cards/pretrain
  deepseek-moe card runs/demo/align/model --output cards/model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", help="a stage's folder, the parent of several such as runs/demo, or a model's folder")
    parser.add_argument("--name", help="the model's name (default: from --repo-id, else from the folder)")
    parser.add_argument("--repo-id", help="where the model will lie on the Hub, for the loading examples")
    parser.add_argument(
        "--license",
        "--licence",
        metavar="ID",
        help="license of the weights, as the Hub spells it (default: what the base model's card states, else none)",
    )
    parser.add_argument("--template", help="a Jinja template in place of the embedded one, with the same variables")
    parser.add_argument("--output", metavar="DIR", help="where the files go (default: RUN)")


def run(args: argparse.Namespace) -> int:
    """Write card and report and print the paths and the closing table."""
    from deepseek_model_cards.card.card import write_card
    from deepseek_model_cards.report.report import summary_table, write_report
    from deepseek_records.lineage import read_lineage

    names = ("name", "license", "repo_id", "template", "output")
    card = write_card(args.run, **{name: getattr(args, name) for name in names})
    if not read_lineage(args.run).stages:
        print(f"model card  {card}\nno report: {args.run} holds a model and no run")
        return 0
    report = write_report(args.run, Path(args.output or args.run) / "report.html", with_items=True)
    print(summary_table(args.run))
    print(f"\nmodel card  {card}\nreport      {report}")
    return 0
