"""``make demo-futures``: the article's four directions on the demo's models, in under 20 minutes on two cores.

What its experts do, one more text behind the gate, the model as files for other runtimes, and a model that sees and
hears. Every step is a command that a user could type, printed before it runs; the last lines tell how long each took.
That the gate refuses the text, or a target is missed, is an outcome and no failure. A finished step is not run again.

    python -m deepseek_cli.demo_futures [--demo runs/demo] [--output runs/futures] [--runtime DIR] [--dry-run]
"""

import argparse
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from deepseek_records.exit_codes import DONE, MISSED
from deepseek_records.run_folder import RunFolder

TEXT = "The doctor told the patient that"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: As the table at the end has it.
        command: Behind ``deepseek-moe``.
        leaves: What is there when it has finished.
        on_miss: What exit code 3 means here.
    """

    name: str
    command: list[str]
    leaves: Path
    on_miss: str = "a target was missed"


def main(argv: list[str] | None = None) -> int:
    """Run the steps that have not finished.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        0, or the exit code of the step that failed.
    """
    from deepseek_cli.main import main as run_command

    parser = argparse.ArgumentParser(
        prog="demo-futures", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--demo", default="runs/demo", help="folder of the demo's runs")
    parser.add_argument("--output", default="runs/futures", help="folder of the runs")
    parser.add_argument(
        "--runtime", default=None, help="where npm installed onnxruntime-web; without, no page is made"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    args = parser.parse_args(argv)
    demo, root = Path(args.demo), Path(args.output)
    steps = list_steps(demo, root, args.runtime)
    if args.dry_run:
        print("\n".join(f"deepseek-moe {shlex.join(step.command)}" for step in steps))
        return DONE
    lacking = [name for name in ("adapt", "sft", "align") if not RunFolder(demo / name).is_finished]
    if lacking:
        line = f"demo-futures: error: --demo: got {demo} without a finished {lacking[0]}, expected one; run make demo"
        print(line, file=sys.stderr)
        return 2
    copy_run(demo / "adapt", root / "learned")
    rows = []
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if step.leaves.exists():
            print(f"{title}: done before", flush=True)
            rows.append((step.name, "done before", ""))
            continue
        print(f"\n{title}: deepseek-moe {shlex.join(step.command)}", flush=True)
        began, cpu = time.monotonic(), time.process_time()
        code = run_command(step.command)
        if code not in (DONE, MISSED):
            return code
        seconds = f"{time.monotonic() - began:.0f} s, {time.process_time() - cpu:.0f} s of processor time"
        rows.append((step.name, seconds, step.on_miss if code == MISSED else ""))
    print("\n" + "\n".join(f"{name:<22}{seconds:<40}{what}".rstrip() for name, seconds, what in rows))
    return DONE


def list_steps(demo: Path, root: Path, runtime: str | None) -> list[Step]:
    """Return the steps.

    Args:
        demo: Folder of the demo's runs.
        root: Folder of these runs.
        runtime: Where npm installed onnxruntime-web, or None.
    """
    align, learned, onnx = str(demo / "align"), root / "learned", root / "onnx"
    seen, media = root / "multimodal", root / "media"
    steps = [
        Step(
            "explain",
            ["explain", align, "--text", TEXT, "--output", str(root / "explain")],
            root / "explain/explain.html",
        ),
        Step(
            "update",
            ["update", str(learned), "--data", "finance"],
            learned / "updates/0001/summary.json",
            "refused by the gate: the old model stays",
        ),
        Step("export to ONNX", ["export", align, str(onnx), "--to", "onnx"], onnx / "export.json"),
    ]
    if runtime is not None:
        page = root / "page"
        command = ["export", align, str(page), "--to", "browser", "--runtime", runtime]
        steps.append(Step("export to a browser", command, page / "export.json"))
    return [
        *steps,
        Step(
            "see and hear",
            ["multimodal", "multimodal-demo", "--model", str(demo / "sft/model"), "--output", str(seen)],
            seen / "summary.json",
        ),
        Step(
            "ask what it saw",
            ["evaluate", str(seen), "--tasks", "digits,shapes,tones", "--output", str(media)],
            media / "summary.json",
        ),
    ]


def copy_run(source: Path, target: Path) -> None:
    """Copy a finished run, which an update writes into, without its checkpoints; the copy appears whole.

    Args:
        source: The run folder.
        target: Where, absent or copied before.
    """
    if RunFolder(target).is_finished:
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, symlinks=True, ignore=shutil.ignore_patterns("checkpoints", "updates", "current"))
    partial.rename(target)


if __name__ == "__main__":
    sys.exit(main())
