"""Runs the generated hostile candidates under a checkout's sandbox and counts which of them it calls passed.

    python compare_generated.py CHECKOUT    # a folder of this repository at any commit

Where the checkout has no `run_tests`, candidate and tests run as one program, as it ran them.
"""

import collections
import importlib
import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))
from candidates import FORGED
from hostile_generator import TESTS, generate


def load_client(checkout: Path) -> types.ModuleType:
    """The checkout's client, without what else the package would import."""
    for name, folder in (("deepseek_eval", "eval"), ("deepseek_eval.sandbox", "eval/sandbox")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / folder)]
    return importlib.import_module("deepseek_eval.sandbox.client")


def main() -> None:
    client = load_client(Path(sys.argv[1]).resolve())
    programs = generate()
    pairs = [*((source, TESTS) for source in programs.values()), *FORGED.values()]
    if hasattr(client, "run_tests"):
        results = client.run_tests(pairs, timeout_s=3.0)
    else:
        results = client.run_programs([f"{source}\n{tests}" for source, tests in pairs], timeout_s=3.0)
    passed = [name for name, result in zip([*programs, *FORGED], results, strict=True) if result.passed]
    generated = [name for name in passed if name in programs]
    report = {"generated": len(programs), "passed": len(generated), "written": len(FORGED)}
    report["written that passed"] = sorted(set(passed) - set(generated))
    for place, kind in enumerate(("start", "rewrite", "forgery")):
        report[kind] = collections.Counter(name.split(" / ")[place] for name in generated)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
