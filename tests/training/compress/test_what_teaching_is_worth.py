"""What a cut start and a teacher are worth: students of a third of the demo's architecture, at equal tokens.

A smaller relative of what was measured on the demo's model over five seeds (100 steps, in bits per byte): a student
that is cut and taught ended 0.79 to 0.88 below new weights on the text alone, 0.023 to 0.032 below a cut one without a
teacher, new weights gained 0.072 to 0.138 by the teacher, and its 8 likeliest tokens with one bucket for the others
cost 0.0135 to 0.0155. The bars leave room for a teacher that has seen a fifth of the tokens.
"""

import pytest

from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.stages.distill import distill
from deepseek_training.stages.pretrain import pretrain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUICK = {"sequence_length": 128, "save_steps": 0, "sample_prompts": [], "eval_bytes": 60_000, "report_to": []}
ARMS = {
    "new, text": {"start": "fresh", "distill_weight": 0.0},
    "new, taught": {"start": "fresh"},
    "cut, text": {"distill_weight": 0.0},
    "cut, taught": {},
    "cut, taught by 8": {"cache_top_k": 8, "cache": "cache"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("worth")
    short = {"max_steps": 250, "eval_steps": 0, "sample_steps": 0, "check_bigram": False}
    pretrain(load_recipe("pretrain-demo", PretrainRecipe, {**QUICK, **short}), root / "teacher")
    for name, settings in ARMS.items():
        if "cache" in settings:
            settings = {**settings, "cache": str(root / settings["cache"])}
        given = {**QUICK, "teacher": str(root / "teacher" / "model"), "max_steps": 60, **settings}
        distill(load_recipe("distill-demo", DistillRecipe, given), root / name)
    return {path.name: RunFolder(path).summary for path in root.iterdir() if RunFolder(path).is_finished}


def test_a_cut_start_and_a_teacher_are_worth_what_they_cost(runs):
    bits = {name: summary.results[-1].value for name, summary in runs.items()}
    assert bits["cut, taught"] < bits["new, text"] - 0.3, bits
    assert bits["cut, taught"] < bits["cut, text"] - 0.005, bits
    assert bits["new, taught"] < bits["new, text"] - 0.02, bits
    assert bits["cut, taught"] < bits["cut, taught by 8"] + 0.005 < bits["cut, taught"] + 0.04, bits
    assert bits["cut, taught by 8"] < bits["cut, text"], bits


def test_the_students_experts_are_as_balanced_as_the_teachers(runs):
    def imbalance(summary):
        return max(max(layer) * len(layer) / sum(layer) for layer in summary.tokens_per_expert)

    for name in ("cut, taught", "cut, text"):
        assert imbalance(runs[name]) <= 1.3 * imbalance(runs["teacher"]), name
