"""``deepseek-moe card``: the model card and the report of a run, from its folder alone."""

import argparse
from pathlib import Path

HELP = "Write the model card (README.md, .eval_results/) and report.html of a finished run."
EXAMPLES = """
  deepseek-moe card runs/demo
  deepseek-moe card runs/demo --repo-id someone/my-moe --licence mit
  deepseek-moe card runs/demo/pretrain --template my_card.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", help="a stage's folder, or the parent of several, such as runs/demo")
    parser.add_argument("--name", help="the model's name (default: from --repo-id, else from the folder)")
    parser.add_argument("--repo-id", help="where the model will lie on the Hub, for the loading examples")
    parser.add_argument("--licence", default="apache-2.0", help="licence of the weights, as the Hub spells it")
    parser.add_argument("--template", help="a Jinja template in place of the embedded one, with the same variables")


def run(args: argparse.Namespace) -> int:
    """Write card and report and print the paths and the closing table."""
    from deepseek_model_cards.card.card import write_card
    from deepseek_model_cards.report.report import summary_table, write_report

    card = write_card(args.run, name=args.name, licence=args.licence, repo_id=args.repo_id, template=args.template)
    report = write_report(args.run, Path(args.run) / "report.html", with_items=True)
    print(summary_table(args.run))
    print(f"\nmodel card  {card}\nreport      {report}")
    return 0
