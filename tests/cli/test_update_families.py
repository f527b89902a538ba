"""`update` for models of stock families: the run of `adapt` on a tiny Qwen3-MoE or Mixtral learns on."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_cli.main import main
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.stages.adapt import adapt

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("update")]
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1},
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three domains of made sentences, each with an order of its own."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = {
        "tales": ["mill", "river", "king", "fox", "tailor", "tower"],
        "recipes": ["flour", "butter", "sugar", "salt", "cream", "lemon"],
        "notes": ["aspirin", "insulin", "warfarin", "heparin", "digoxin", "morphine"],
    }
    verbs = {"tales": "went to the", "recipes": "is stirred into the", "notes": "is given before the"}
    for name, nouns in words.items():
        rows = [
            "\n".join(f"The {draw.choice(nouns)} {verbs[name]} {draw.choice(nouns)}." for _ in range(6))
            for _ in range(240)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_family_learns_on_behind_the_gate(family, texts, tmp_path, capsys):
    rows = [json.loads(line)["text"] for path in sorted(texts.iterdir()) for line in path.read_text().splitlines()]
    tokenizer = train_tokenizer(rows, 350)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    settings = {"model": str(tmp_path / "stock"), "data": str(texts / "recipes.jsonl")}
    settings |= {"general_data": str(texts / "tales.jsonl"), "replay_share": 0.4, "sequence_length": 64}
    settings |= {"batch_size": 8, "max_steps": 60, "learning_rate": 5e-3, "warmup_steps": 5, "report_to": []}
    run = tmp_path / "run"
    adapt(build_recipe(settings, AdaptRecipe), run)
    before = load_file(run / "model" / "model.safetensors")
    # Half-way only: what matters is that every part works for the family, not how much is learned.
    words = ["--max-steps", "30", "--alphas", "[0.5]", "--max-loss", "0.5", "--min-order-errors", "null"]
    code = main(["update", str(run), "--data", str(texts / "notes.jsonl"), *words])
    assert code == 0, capsys.readouterr()
    told = json.loads((run / "updates/0001/gates.json").read_text())
    assert {one["dataset"] for one in told["findings"] if one["kind"] == "loss"} == {"tales", "recipes"}
    gain = next(one for one in told["findings"] if one["kind"] == "gain")
    assert told["accepted"] and gain["value"] < -0.2
    assert {row["dataset"] for row in told["drift"]} == {"notes", "tales", "recipes"}
    assert all(abs(row["corrected"]) < 10 for row in told["drift"])
    model = AutoModelForCausalLM.from_pretrained(run / "current")
    assert model.config.model_type == family
    trained = load_file(run / "current" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert trained.keys() == before.keys() and any("expert" in name for name in moved)
    assert main(["update", str(run), "--roll-back"]) == 0
    # Without replay and all the way, what was known is lost, and the gate says so.
    lost = ["--max-steps", "60", "--alphas", "[1.0]", "--replay-share", "0", "--learning-rate", "0.01"]
    assert main(["update", str(run), "--data", str(texts / "notes.jsonl"), *lost]) == 3
    assert "lost" in " ".join(json.loads((run / "updates/0002/gates.json").read_text())["why"])
