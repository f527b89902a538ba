"""Runs what a model card prints, as its reader would."""

import contextlib
import io
import re
import shlex
from pathlib import Path

from deepseek_cli.main import main


def run_all_that_it_prints(readme: Path) -> list[str]:
    """Run each block of the card from the card's folder, as a reader would; return what was run."""
    text = readme.read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    blocks += [("bash", line) for line in re.findall(r"To measure again: `([^`]+)`", text)]
    with contextlib.chdir(readme.parent):
        for language, code in blocks:
            written = io.StringIO()
            with contextlib.redirect_stdout(written):
                if language == "python":
                    exec(compile(code, "card", "exec"), {})
                else:
                    assert [main(shlex.split(line)[1:]) for line in code.splitlines()] == [0]
            assert written.getvalue(), code
    return [code for _, code in blocks]
