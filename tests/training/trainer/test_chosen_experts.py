"""ESFT: which experts are chosen, that nothing else moves by a bit, and that a run goes on where it stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.trainer.chosen_experts import RowAdamW, choose_experts, freeze_others
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 61,
}
FEW = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "ours": lambda: DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=61)),
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(num_local_experts=4, **FEW, **SMALL)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(num_experts=4, moe_intermediate_size=8, **FEW, **SMALL)
    ),
    # Experts transposed, with biases.
    "gpt_oss": lambda: AutoModelForCausalLM.from_config(
        GptOssConfig(num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2, **FEW, **SMALL)
    ),
}
BLOCKS = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(0))


def build(name):
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for layer in find_moe_layers(model):
        torch.nn.init.normal_(next(layer.router.parameters()), std=0.5)
    return model


@pytest.mark.parametrize("score", ["tokens", "gate"])
def test_the_fewest_experts_that_reach_the_share(score):
    model = build("ours")
    layer, counted = find_moe_layers(model)[0], torch.zeros(8, dtype=torch.float64)

    def count(router, args, output):
        _, weights, indices = output[:3]
        for token in range(len(indices)):
            for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
                counted[expert] += weight if score == "gate" else float(weight != 0)

    handle = layer.router.register_forward_hook(count)
    for top_p in (0.2, 0.6, 1.0):
        counted.zero_()
        chosen = choose_experts(model.train(), BLOCKS, top_p=top_p, score=score)[0]
        assert model.training and chosen.name == layer.name
        shares = counted / counted.sum()
        torch.testing.assert_close(torch.tensor(chosen.scores, dtype=torch.float64), shares)
        kept = shares[list(chosen.experts)]
        assert kept.sum() >= top_p - 1e-6 and (kept.sum() - kept.min() < top_p)
        assert kept.min() >= max(shares[[e for e in range(8) if e not in chosen.experts]].tolist(), default=0)
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_chosen_move_and_the_state_is_theirs(family):
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = choose_experts(model, BLOCKS, top_p=0.4)
    chosen = freeze_others(model, layers)
    optimizer = RowAdamW(chosen, lr=0.01, weight_decay=0.5)
    for _ in range(2):
        model.train()(input_ids=BLOCKS, labels=BLOCKS).loss.backward()
        optimizer.step()
        model.zero_grad()
    allowed = {one.name.rpartition(".")[2]: one for one in chosen}
    for name, value in model.state_dict().items():
        layer = next((one for one in layers if name.startswith(f"{one.name}.experts.")), None)
        for expert in range(len(value)) if layer else [...]:
            is_chosen = layer is not None and expert in layer.experts and name.rpartition(".")[2] in allowed
            assert torch.equal(value[expert], before[name][expert]) != is_chosen, (name, expert)
    numbers = sum(part.numel() for state in optimizer.state.values() for part in state.values() if part.dim())
    assert numbers == 2 * sum(one.num_trained for one in chosen)


def test_the_step_is_adamws_of_the_slices():
    """Without decay AdamW of whole tensors leaves an expert alone that gets no gradient: then the two are equal."""
    ours, plain = build("mixtral"), build("mixtral")
    chosen = freeze_others(ours, choose_experts(ours, BLOCKS, top_p=0.4))
    masks = freeze_others(plain, choose_experts(plain, BLOCKS, top_p=0.4))
    steps = (
        RowAdamW(chosen, lr=0.01, weight_decay=0.0),
        torch.optim.AdamW([one.parameter for one in masks], lr=0.01, weight_decay=0.0),
    )
    for model, optimizer in zip((ours, plain), steps, strict=True):
        for _ in range(3):
            model(input_ids=BLOCKS, labels=BLOCKS).loss.backward()
            optimizer.step()
            model.zero_grad()
    for first, other in zip(chosen, masks, strict=True):
        torch.testing.assert_close(first.parameter, other.parameter, rtol=1e-6, atol=1e-7)


def test_a_dense_model_is_refused():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=r"esft_top_p: got 0\.2 for LlamaForCausalLM, expected null"):
        choose_experts(model, BLOCKS, top_p=0.2)


@pytest.fixture(scope="module")
def command(policy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("books", "medicine"):
        rows = [{"text": text[:2000]} for text in load_texts(name, "validation")[:20]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["adapt", "adapt-debug", "--model", str(policy_path), "--data", str(folder / "medicine.jsonl")]
    words += ["--general-data", str(folder / "books.jsonl"), "--report-to", "[]", "--sequence-length", "32"]
    small = ["--max-steps", "4", "--logging-steps", "2", "--save-steps", "2", "--warmup-steps", "0"]
    return [*words, *small, "--sample-prompts", "[]", "--eval-bytes", "2000", "--replay-share", "0.05"]


@pytest.mark.slow
def test_adapt_moves_the_chosen_alone_and_goes_on(command, policy_path, tmp_path):
    still = ["--esft-top-p", "0.3", "--bias-update-speed", "0"]
    assert main([*command, *still, "--output", str(tmp_path / "whole")]) == 0
    old, new = (load_file(path / "model.safetensors") for path in (policy_path, tmp_path / "whole" / "model"))
    details = RunFolder(tmp_path / "whole").summary.details
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    allowed = {f"{layer}.experts.{e}." for layer, experts in details["chosen_experts"].items() for e in experts}
    assert moved and all(any(name.startswith(prefix) for prefix in allowed) for name in moved)
    assert all(any(name.startswith(prefix) for name in moved) for prefix in allowed)
    trained = sum(old[name].numel() for name in moved)
    assert details["num_trained_parameters"] == trained < sum(value.numel() for value in old.values()) / 4
    whole = tmp_path / "whole"
    cut = whole.rename(tmp_path / "cut")
    for path in (cut / "model").iterdir():
        path.unlink()
    (cut / "model").rmdir()
    (cut / "summary.json").unlink()  # the checkpoint of step 4 is there: nothing is left to train
    assert main([*command, *still, "--output", str(cut)]) == 0
    again = load_file(cut / "model" / "model.safetensors")
    assert all(torch.equal(again[name], new[name]) for name in new)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--esft-top-p", "1.5"], "esft_top_p: got 1.5, expected null, or above 0 and at most 1"),
        (["--esft-score", "gate"], "esft_score: got 'gate', expected null without esft_top_p"),
        (["--esft-top-p", "0.2"], "bias_update_speed: got 0.01, expected null or 0 with esft_top_p=0.2"),
        (["--esft-top-p", "0.2", "--bias-update-speed", "0", "--lora-rank", "2"], "lora_rank: got 2, expected 0 with"),
    ],
)
def test_bad_settings_are_one_line(command, tmp_path, capsys, more, message):
    assert main([*command, *more, "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
