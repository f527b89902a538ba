"""The example of docs/training_a_moe.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "training_a_moe.md"


def test_the_example_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "IndexerTrainingCallback.attach" in block]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    history = names["trainer"].state.log_history
    assert ["indexer_recall" in line for line in history if "indexer_kl" in line] == [True, True, False, False]
