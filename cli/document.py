"""``deepseek-moe document``: the documents that the EU AI Act asks of a model's provider, from a run's folder."""

import argparse
import json
from pathlib import Path

from deepseek_records.exit_codes import DONE, MISSED

HELP = "Write the EU AI Act's technical documentation and public summary of training content from a run."
EXAMPLES = """
  deepseek-moe document runs/demo runs/demo-documents
  deepseek-moe document runs/demo --check
  deepseek-moe document runs/demo --write-answers my-answers.yaml
  deepseek-moe document runs/demo runs/demo-documents --answers my-answers.yaml --high-risk
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", help="a stage's folder, the parent of several such as runs/demo, or a model's folder")
    parser.add_argument("output", metavar="OUT", nargs="?", help="folder for the documents: Markdown, JSON and HTML")
    parser.add_argument("--answers", metavar="FILE", help="your own answers, a YAML file, marked as yours")
    parser.add_argument("--write-answers", metavar="FILE", help="write a YAML file with every field that is open")
    parser.add_argument("--high-risk", action="store_true", help="document a high-risk system too (Annex IV)")
    parser.add_argument("--check", action="store_true", help="list what is missing by article, and write nothing")
    parser.add_argument("--json", action="store_true", help="with --check: print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the documents, the file of answers, or the list of what is missing.

    Returns:
        3 where --check misses something required, or an answer contradicts a file; else 0.
    """
    _refuse_unused(args)
    from deepseek_model_cards.eu.answers import write_answers
    from deepseek_model_cards.eu.documents import read_documents, write_documents
    from deepseek_model_cards.eu.missing import describe_missing, format_missing
    from deepseek_records.output_paths import make_file_place

    documents = read_documents(args.run, args.answers, is_high_risk=args.high_risk)
    missing = describe_missing(documents)
    if args.check:
        print(json.dumps(missing, indent=2, ensure_ascii=False) if args.json else format_missing(missing))
        return MISSED if not missing["complete"] or missing["contradictions"] else DONE
    if args.write_answers:
        path = make_file_place(args.write_answers, "--write-answers")
        entries = [entry for _, entry in documents.entries]
        open_fields = write_answers(path, entries, documents.records, documents.answers, documents.documents)
        print(f"{open_fields} fields to answer in {path}")
    if args.output:
        for file in write_documents(documents, Path(args.output)):
            print(file)
        required = sum(bool(row["required"]) for row in missing["missing"])
        print(f"{required} required fields are open; list them: deepseek-moe document {args.run} --check")
        for note in missing["notes"]:
            print(f"note: {note}")
    for key, why in missing["contradictions"].items():
        print(f"{args.subparser.prog}: the answer to {key} contradicts a file: {why}")
    return MISSED if missing["contradictions"] else DONE


def _refuse_unused(args: argparse.Namespace) -> None:
    if args.check and (args.output or args.write_answers):
        raise ValueError("--check: got OUT or --write-answers too, expected it alone, for it writes nothing")
    if args.json and not args.check:
        raise ValueError("--json: without effect without --check; the documents are also written as JSON")
    if not (args.check or args.output or args.write_answers):
        raise ValueError("OUT: got nothing, expected a folder for the documents, --check or --write-answers FILE")
