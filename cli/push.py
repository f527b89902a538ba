"""``deepseek-moe push``: upload a run's model, card, results and report to the Hub in one commit."""

import argparse

HELP = "Upload a run to the Hub in one commit: weights, tokenizer, code, card, results, report."
EXAMPLES = """
  deepseek-moe push runs/demo someone/my-moe --dry-run
  deepseek-moe push runs/demo someone/my-moe --private
  deepseek-moe push runs/demo someone/my-moe --revision second-try
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", help="a stage's folder, or the parent of several, such as runs/demo")
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, made if it does not exist; else the main branch")
    parser.add_argument("--license", "--licence", metavar="ID", help="license of the weights, as the Hub spells it")
    parser.add_argument("--template", help="a Jinja template for the card in place of the embedded one")
    parser.add_argument("--message", default="Upload model, card and results", help="the commit's message")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be sent; contact nobody")


def run(args: argparse.Namespace) -> int:
    """Upload, or list what would be uploaded."""
    from deepseek_model_cards.hub.push import list_files, push_run

    files, url = push_run(
        args.run,
        args.repo,
        private=args.private,
        revision=args.revision,
        license=args.license,
        template=args.template,
        message=args.message,
        dry_run=args.dry_run,
    )
    print(list_files(files))
    print(f"committed: {url}" if url else "dry run: nothing was sent")
    return 0
