"""Each upstream table that knows DeepSeek-V3 by its model type: decided for ours, and new tables are noticed.

A model type that such a table does not hold is passed over without a word, as adapters with per-expert names were.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

from modeling_deepseek import DeepseekConfig

# Held: ours is in it. Left out: what a user gets instead.
DECIDED = {
    "_MODEL_TO_CONVERSION_PATTERN": "held: PEFT reads LoRA targets and adapters of per-expert names by it",
    "CONFIG_MAPPING_NAMES": "held: AutoConfig",
    "MODEL_MAPPING_NAMES": "held: AutoModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "held: AutoModelForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "held: AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "left out: there is no such class; the Auto class says so",
    "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS": "left out, in 5.17 only: our tokenizers name their class rightly",
    "MODEL_TYPE_TO_APPLY_LIGER_FN": "left out: use_liger_kernel changes nothing; fused_moe is ours",
}


def tables_in(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        return set()
    root = Path(spec.submodule_search_locations[0])
    found = set()
    for path in root.rglob("*.py"):
        inside = path.relative_to(root).parts
        if inside[0] == "models" and inside[1:2] != ("auto",):
            continue  # families' own files
        source = path.read_text(encoding="utf-8", errors="ignore")
        if '"deepseek_v3"' not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if any(isinstance(one, ast.Constant) and one.value == "deepseek_v3" for one in ast.walk(node)):
                    found.add(ast.unparse(target))
    return found


@pytest.mark.parametrize("package", ["transformers", "peft", "trl", "liger_kernel", "accelerate"])
def test_every_table_that_knows_deepseek_v3_is_decided(package):
    assert tables_in(package) <= DECIDED.keys()


def test_what_is_said_to_be_held_is():
    config = DeepseekConfig.from_preset("debug")
    assert _MODEL_TO_CONVERSION_PATTERN["deepseek_moe"] == _MODEL_TO_CONVERSION_PATTERN["deepseek_v3"]
    assert type(AutoConfig.for_model("deepseek_moe")) is DeepseekConfig
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        assert type(auto_class.from_config(config)).__module__.startswith("modeling_deepseek")
