"""The ``deepseek-moe`` command: finds the subcommand, runs it, and turns what users get wrong into one line.

Called by the console script and by ``python -m deepseek_cli.main``. Nothing heavy is imported here, nor by
any subcommand's module at its top, so that ``--help`` answers at once; and a `ValueError` or a missing or occupied
file ends in one line on stderr and exit code 2, a full disk or another failure on the way in one line and code 1
(``--traceback`` shows where it came from), while any other exception is a defect of ours and keeps its traceback.
"""

import argparse
import errno
import importlib
import os
import signal
import sys
import traceback
from importlib import metadata
from typing import NoReturn

from deepseek_records.exit_codes import BAD_INPUT, FAILED, RunFailedError, SameInAllProcessesError
from deepseek_records.nearest_name import did_you_mean
from deepseek_records.output_paths import check_output
from deepseek_records.stop_signals import Interrupted, close_standard_output, how_to_go_on, stop_signals

SUBCOMMANDS = (
    "demo",
    "data",
    "pretrain",
    "adapt",
    "distill",
    "shrink",
    "upcycle",
    "quantize",
    "sft",
    "align",
    "grpo",
    "dpo",
    "multimodal",
    "evaluate",
    "generate",
    "explain",
    "serve",
    "monitor",
    "update",
    "merge",
    "export",
    "card",
    "document",
    "push",
    "params",
    "plan",
    "launch",
    "doctor",
    "bench",
)
# Commands of two words, by their modules; argparse has one name with a space for each.
_OF_TWO_WORDS = {"data graph": "data_graph"}
_USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

_ERRORS_OF_THE_PATH = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
_ERRORS_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# What safetensors, torch.save and numpy's tofile say in their own exceptions.
_SIGNS_OF_A_FULL_DISK = ("(os error 28)", "inline_container.cc", "PytorchStreamWriter", " requested and ")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default and keeps the examples' line breaks."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        # "(default: None)" and "(default: False)" tell nothing that the text does not.
        if action.default in (None, False, argparse.SUPPRESS) or action.required:
            return action.help or ""
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; argparse alone prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command, with every subcommand's options."""
    parser = _Parser(
        prog="deepseek-moe",
        description="Train, align, evaluate and ship DeepSeek-style Mixture-of-Experts language models.",
        epilog="Begin with: deepseek-moe demo",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deepseek-moe {_read_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in (*SUBCOMMANDS, *_OF_TWO_WORDS):
        module = importlib.import_module(f"deepseek_cli.{_OF_TWO_WORDS.get(name, name)}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"examples:\n{module.EXAMPLES.rstrip()}",
            formatter_class=_HelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        # Not `run`: card and push have an argument of that name.
        takes_settings = getattr(module, "TAKES_SETTINGS", False)
        command.set_defaults(run_command=module.run, subparser=command, takes_settings=takes_settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: The arguments after the command's name; None takes the process's.

    Returns:
        A code of `deepseek_records.exit_codes`; 130 after Ctrl-C, 143 after SIGTERM.
    """
    prog = "deepseek-moe"
    with stop_signals() as stop:
        try:
            args = _parse(build_parser(), argv)
            prog = args.subparser.prog
            _quieten_libraries()
            if getattr(args, "output", None) and args.command != "export":  # export writes a folder or a file
                check_output(args.output)
            return args.run_command(args)
        except KeyboardInterrupt as error:
            return _tell_interruption(prog, error, stop.number)
        except BrokenPipeError:
            close_standard_output()
            return FAILED
        except Exception as error:
            if stop.number is not None:  # A library has made another exception of it.
                return _tell_interruption(prog, error, stop.number)
            told = _message_for_users(error)
            if told is None:
                raise
            if args.traceback:
                traceback.print_exc()
            code, message = told
            if not isinstance(error, SameInAllProcessesError) or _is_first_process():
                print(f"{prog}: error: {message}", file=sys.stderr)
            return code


def _tell_interruption(prog: str, error: BaseException, number: int | None) -> int:
    if _is_first_process():
        print(f"\n{prog}: interrupted; {how_to_go_on(error)}", file=sys.stderr)
    return Interrupted(number or signal.SIGINT).exit_code


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # of several processes one tells


def _message_for_users(error: Exception) -> tuple[int, str] | None:
    """Exit code and one line on what the user can mend; None for a defect of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, RunFailedError):
        return FAILED, text
    if isinstance(error, OSError) and error.errno:
        path = error.filename2 or error.filename  # Of a copy the second: it is there that space was lacking.
        message = f"{path}: {error.strerror}" if path else error.strerror
        if error.errno in _ERRORS_OF_THE_MACHINE:
            return FAILED, message
        return (BAD_INPUT, message) if isinstance(error, _USER_ERRORS) or error.errno in _ERRORS_OF_THE_PATH else None
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return BAD_INPUT, f"not enough memory ({text[:200]}); take a smaller model, batch or length"
    if any(sign in text for sign in _SIGNS_OF_A_FULL_DISK):
        return FAILED, f"a file could not be written, is the disk full? ({text[:200]})"
    return (BAD_INPUT, text) if isinstance(error, _USER_ERRORS) else None


def _read_version() -> str:
    try:
        return metadata.version("deepseek-moe")
    except metadata.PackageNotFoundError:  # run from a source tree, as dev/measure_on_gpu.sh can
        return "(not installed)"


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, naming the nearest option where one is unknown; argparse alone only repeats what was typed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if " ".join(words[:2]) in _OF_TWO_WORDS:
        words[:2] = [" ".join(words[:2])]
    args, unknown = parser.parse_known_args(words)
    args.settings = unknown if args.takes_settings else []
    if unknown and not args.takes_settings:
        command = args.subparser
        hint = did_you_mean(unknown[0], command._option_string_actions, otherwise=f"; see {command.prog} --help")
        command.exit(2, f"{command.prog}: error: unknown argument {unknown[0]}{hint}\n")
    return args


def _quieten_libraries() -> None:
    """Leave the terminal to our own progress and warnings; each variable can be set by the user instead."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
