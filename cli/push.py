"""``deepseek-moe push``: upload a run's model, card and results to the Hub in one commit."""

import argparse

HELP = (
    "Upload a run to the Hub in one commit: weights, tokenizer, code, card, results. Private unless asked otherwise."
)
EXAMPLES = """
  deepseek-moe push runs/demo someone/my-moe --license apache-2.0 --dry-run
  deepseek-moe push runs/demo someone/my-moe --license apache-2.0
  deepseek-moe push runs/demo someone/my-moe --license apache-2.0 --public --with-samples --revision second-try
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", help="a stage's folder, the parent of several such as runs/demo, or a model's folder")
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub; made if it does not exist")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--public", action="store_true", help="make a new repository public, or send to one")
    visibility.add_argument("--private", action="store_true", help="the default: a new repository is private")
    parser.add_argument("--revision", help="branch to commit to, made if it does not exist; else the main branch")
    parser.add_argument(
        "--license",
        "--licence",
        metavar="ID",
        help="license of the weights, as the Hub spells it (default: what the base model's card states)",
    )
    parser.add_argument(
        "--with-samples", action="store_true", help="also send report.html, with prompts and what the model wrote"
    )
    parser.add_argument("--template", help="a Jinja template for the card in place of the embedded one")
    parser.add_argument("--message", default="Upload model, card and results", help="the commit's message")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and list what would be sent and held back; contact nobody"
    )


def run(args: argparse.Namespace) -> int:
    """Upload, or list what would be uploaded."""
    from deepseek_model_cards.hub.push import describe_plan, push_run

    names = ("revision", "license", "template", "with_samples", "message", "dry_run")
    options = {name: getattr(args, name) for name in names}
    plan, url = push_run(args.run, args.repo, private=not args.public, **options)
    print(describe_plan(plan))
    if url:
        print(f"committed: {url}")
    else:
        print(f"dry run: nothing was sent; {args.repo} would be {'public' if args.public else 'private'} if it is new")
    return 0
