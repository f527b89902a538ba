"""Every Python path that README and docs name can be imported, and so can those they named before files moved.

A module that moved leaves a re-export under its old name. The `python -m` benchmarks of old left none: their home is
`deepseek-moe bench`.
"""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What README and docs told users to import in version 0.1.0.
DOCUMENTED = [
    "deepseek_eval.comparison.compare_runs",
    "deepseek_eval.sandbox.run_program",
    "deepseek_eval.sandbox.run_tests",
    "deepseek_eval.tasks.long_tail.count_words",
    "deepseek_kernels.fused_moe.fused_moe",
    "deepseek_kernels.tune.tune",
    "deepseek_model_cards.hub_callback.HubCardCallback",
    "deepseek_model_cards.loading.load_model",
    "deepseek_model_cards.loading.load_tokenizer",
    "deepseek_training.align.encode_prompt",
    "deepseek_training.balance.ExpertBalanceCallback",
    "deepseek_training.indexer.IndexerTrainingCallback",
    "deepseek_training.engine.LAUNCH_FOLDER",
    "deepseek_training.engine.prepare_engine",
    "deepseek_training.figures.TrainingFigures",
    "deepseek_training.load_plot.plot_expert_load",
    "deepseek_training.packing.encode_documents",
    "deepseek_training.ppo_trainer.CorrectedPPOTrainer",
    "deepseek_training.rewards.Diversity",
    "deepseek_training.rewards.Relevance",
    "deepseek_training.rewards.Safety",
    "deepseek_training.rewards.WeightedReward",
    "deepseek_training.rewards.encoders.SentenceEncoder",
    "deepseek_training.rewards.encoders.find_minilm",
    "deepseek_training.text_data.load_texts",
    "modeling_deepseek.DeepseekConfig",
    "modeling_deepseek.DeepseekForCausalLM",
    "modeling_deepseek.DeepseekForSequenceClassification",
    "modeling_deepseek.DeepseekModel",
    "modeling_deepseek.draft_acceptance.count_drafts",
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOTTED = re.compile(r"(?<![\w./-])(?:deepseek_[a-z_]+|modeling_deepseek)(?:\.[A-Za-z_]\w*)+(?![\w/])")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"deepseek_\w+|modeling_deepseek")


def named_on_pages() -> dict[str, str]:
    """Each dotted path of ours that a page shows, with the page that shows it first."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        paths = [path for path in DOTTED.findall(text) if not path.endswith((".__file__", ".py"))]
        for block in PYTHON_BLOCK.findall(text):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and OURS.match(node.module or ""):
                    paths += [f"{node.module}.{alias.name}" for alias in node.names]
        for path in paths:
            found.setdefault(path, page.name)
    return found


def resolve(path: str) -> object:
    """Import the longest module in the path and take the rest as attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None:
            found: object = importlib.import_module(name)
            for attribute in parts[length:]:
                found = getattr(found, attribute)
            return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_what_was_documented_still_imports(path):
    assert callable(resolve(path)) or path.endswith("LAUNCH_FOLDER")


def test_what_the_pages_name_imports():
    gone = {}
    for path, page in named_on_pages().items():
        try:
            resolve(path)
        except (ModuleNotFoundError, AttributeError) as error:
            gone[path] = f"{page}: {error}"
    assert not gone


def test_a_path_that_is_gone_is_noticed():
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        resolve("deepseek_training.no_such_module.name")
    with pytest.raises(AttributeError):
        resolve("deepseek_eval.sandbox.no_such_name")
