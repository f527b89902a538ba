"""What every benchmark leaves in its folder: the table as printed, its figures as JSON, versions and machine.

Called by the modules that `deepseek_cli.bench` starts.
"""

import time
from pathlib import Path
from typing import Any

from deepseek_records.environment import describe_environment
from deepseek_records.run_folder import ENVIRONMENT_FILE, RunFolder, write_json, write_text
from deepseek_records.summary import Summary
from deepseek_records.typed_json import to_json

RESULTS_FILE, TABLE_FILE = "results.json", "table.txt"


class BenchmarkRun:
    """The run folder of a benchmark that measures in one go.

    Args:
        what: The word after ``bench``.
        output: The folder.
        settings: What the figures depend on, plain YAML values.
        overwrite: Delete whatever run the folder holds.

    Raises:
        FileExistsError: The folder holds a finished run, a run with other settings, or files of another kind.
    """

    def __init__(self, what: str, output: str, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.began = time.time()
        self.folder = RunFolder.create(output, settings, command=f"bench {what}", seed=0, overwrite=overwrite)

    def finish(self, figures: dict[str, Any], table: str) -> None:
        """Write the figures and the table, and mark the run as finished.

        Args:
            figures: Plain JSON values.
            table: As printed.
        """
        write_json(self.folder.path / RESULTS_FILE, figures)
        write_text(self.folder.path / TABLE_FILE, table + "\n")
        self.folder.finish(Summary(stage="bench", seconds=time.time() - self.began))
        print(f"written to {self.folder.path}")


def write_over_runs(root: Path, what: str, figures: dict[str, Any], table: str) -> None:
    """Write figures and table beside the run folders that they were collected from.

    Args:
        root: The folder that holds the run folders.
        what: The word after ``bench``.
        figures: Plain JSON values.
        table: As printed.
    """
    write_json(root / ENVIRONMENT_FILE, to_json(describe_environment(f"bench {what}")))
    write_json(root / RESULTS_FILE, figures)
    write_text(root / TABLE_FILE, table + "\n")
    print(f"written to {root}")
