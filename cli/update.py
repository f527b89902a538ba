"""``deepseek-moe update``: teach a finished run's model one more text, behind a gate; or take the last one back."""

import argparse
import os
from pathlib import Path
from typing import Any

HELP = "Teach the model of a finished run one more text; keep it only if nothing earlier is lost."
EXAMPLES = """
  deepseek-moe update runs/demo/adapt --data finance --dry-run
  deepseek-moe update runs/demo/adapt --data finance
  deepseek-moe update runs/demo/adapt --data prose_zh --method esft
  deepseek-moe update runs/demo/adapt --roll-back

The model in force is RUN/current, which every command takes. An interrupted update goes on when the same command is
given again; --discard drops it. A refused one ends with code 3 and leaves RUN/current; its gates.json says why.
"""
_WITHOUT = ("--roll-back", "--discard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run, what to do with it, and the settings."""
    from deepseek_training.recipes.loading import add_setting_arguments
    from deepseek_training.recipes.update import UpdateRecipe

    parser.add_argument("run", metavar="RUN", help="folder of a finished run with a model")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--roll-back", action="store_true", help="put the former model in force again")
    what.add_argument("--discard", action="store_true", help="delete an update that was begun and not finished")
    parser.add_argument("--dry-run", action="store_true", help="print what would happen, and write nothing")
    add_setting_arguments(parser, UpdateRecipe, but=("model",))


def run(args: argparse.Namespace) -> int:
    """Update, roll back or discard, and print what came of it.

    Returns:
        0, or 3 where the gate refused.
    """
    from deepseek_records.exit_codes import DONE, MISSED
    from deepseek_training.continual import update_run
    from deepseek_training.recipes.loading import build_recipe, collect_overrides
    from deepseek_training.recipes.update import UpdateRecipe, inherit

    overrides = collect_overrides(args)
    folder = update_run.check_run(args.run)
    for name in _WITHOUT:
        if getattr(args, name[2:].replace("-", "_")):
            if overrides or args.dry_run:
                given = sorted(overrides) or ["dry-run"]
                raise ValueError(f"{name}: got it with --{given[0].replace('_', '-')}, expected it alone")
            done = update_run.roll_back(folder) if name == "--roll-back" else update_run.discard(folder)
            told = "in force again" if name == "--roll-back" else "deleted"
            print(f"{told}: {_short(args.run, folder, done)}")
            return DONE
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(f"processes: got {processes}, expected 1; an update runs in one process")
    if "data" not in overrides:
        raise ValueError("--data: got none, expected the new text")

    from deepseek_cli.router_drift import measure_router_drift
    from deepseek_records.run_folder import RunFolder
    from deepseek_training.stages.update import update

    with update_run.owning(folder):
        base = update_run.base_model(folder)
        settings = {**inherit(RunFolder(folder).settings, overrides), "model": str(base.relative_to(folder))}
        recipe: Any = build_recipe(settings, UpdateRecipe, source="update")
        summary = update(recipe, folder, measure_drift=measure_router_drift, is_dry=args.dry_run)
        if summary is None:
            return DONE
        decision = update_run.last_decision(folder)
    print(format_decision(decision))
    current = Path(args.run) / "current"
    if decision["accepted"]:
        print(f"kept at alpha {decision['alpha']:g}: {current} is updates/{decision['update']} now")
        return DONE
    print(f"refused: {current} is {_short(args.run, folder, base)} as before")
    for why in decision["why"]:
        print(f"  {why}")
    return MISSED


def _short(named: str, folder: Path, path: Path) -> str:
    return str(Path(named) / path.relative_to(folder))


def format_decision(decision: dict[str, Any]) -> str:
    """Return what the gate asked, and the answers, as a table.

    Args:
        decision: What ``gates.json`` holds.
    """
    lines = [f"{'asked':<8}{'of':<18}{'before':>9}{'after':>9}{'change':>10}{'error':>9}{'limit':>10}{'n':>6}"]
    for one in decision["findings"]:
        cells = [f"{one[key]:.4f}" if one.get(key) is not None else "-" for key in ("before", "after")]
        shown = [f"{one[key]:+.4f}" if one.get(key) is not None else "-" for key in ("value", "stderr", "limit")]
        answer = "" if one["passed"] else "  no"
        lines.append(
            f"{one['kind']:<8}{one['dataset']:<18}{cells[0]:>9}{cells[1]:>9}{shown[0]:>10}{shown[1].lstrip('+'):>9}"
            f"{shown[2]:>10}{one['n']:>6}{answer}"
        )
    if decision["drift"]:
        worst = max(decision["drift"], key=lambda row: row["corrected"])
        lines.append(
            f"routers moved most on {worst['dataset']}, layer {worst['layer']}: {worst['corrected']:.4f} nats "
            f"(p = {worst['p']:.3g})"
        )
    return "\n".join(lines)
