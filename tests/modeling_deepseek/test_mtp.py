import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekModel
from modeling_deepseek.draft_acceptance import count_drafts
from modeling_deepseek.modeling_deepseek import DeepseekMtpLayer


def build(tiny, **settings):
    torch.manual_seed(0)
    return DeepseekForCausalLM(
        DeepseekConfig(**{**tiny, "num_nextn_predict_layers": 2, "mtp_loss_coef": 0.3, **settings})
    )


def pattern(rows=8, length=24):
    """Counting up by one from a random start: every later token follows from any earlier one."""
    starts = torch.randint(3, 90, (rows, 1), generator=torch.Generator().manual_seed(0))
    return 3 + (starts + torch.arange(length)) % 90


def plain_mtp_loss(model, rows):
    """One sequence at a time, with sequences really cut short instead of masked; the independent witness."""
    model = model.model
    depth_losses = [[], []]
    for row in rows:
        hidden = super(type(model), model).forward(input_ids=row[None]).last_hidden_state
        for depth, layer in enumerate(model.layers[3:], start=1):
            length = len(row) - depth
            embeds = model.embed_tokens(row[depth:])[None]
            joined = torch.cat([layer.enorm(embeds), layer.hnorm(hidden[:, :length])], dim=-1)
            positions = torch.arange(length)[None]
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
            hidden = super(DeepseekMtpLayer, layer).forward(
                layer.eh_proj(joined),
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=model.rotary_emb(joined, positions),
            )
            hidden = layer.shared_head.norm(hidden)
            logits = model.get_head()(hidden[0, : len(row) - depth - 1])
            depth_losses[depth - 1].append(
                torch.nn.functional.cross_entropy(logits, row[depth + 1 :], reduction="none")
            )
    return sum(torch.stack([loss.mean() for loss in losses]).mean() for losses in depth_losses) / 2


def mtp_gradients(model, **inputs):
    model.train().zero_grad()
    (model(**inputs).logits.sum() * 0).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_dense", [3, 4, 5])
def test_dense_layers_before_the_last_one(tiny, num_dense):
    """All of the decoder and none, one or two of the prediction layers."""
    model = build(tiny, num_hidden_layers=3, first_k_dense_replace=num_dense).train()
    output = model(pattern(), attention_mask=torch.ones(8, 24), output_router_logits=True)
    if hasattr(output, "router_logits"):  # DeepSeek-V3 of transformers 5.17 reports none
        assert output.aux_loss == 0 and not output.router_logits, "the decoder has no router"
    (output.logits.sum() * 0).backward()
    assert all(layer.eh_proj.weight.grad.abs().max() > 0 for layer in model.model.layers[3:])


def test_gradient_is_the_papers_loss(tiny):
    """Witness: the definition over rows of different lengths, through autograd, without our attaching."""
    model = build(tiny)
    rows, lengths = pattern(3, 11), [11, 7, 9]
    mask = torch.tensor([[1] * n + [0] * (11 - n) for n in lengths])
    found = mtp_gradients(model, input_ids=rows * mask, attention_mask=mask)
    packed = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found_packed = mtp_gradients(model, input_ids=packed, position_ids=positions)
    model.zero_grad()
    (0.3 * plain_mtp_loss(model, [row[:n] for row, n in zip(rows, lengths, strict=True)])).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for gradients in (found, found_packed):
            torch.testing.assert_close(
                gradients[name], expected, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
            )
    assert found["model.layers.4.eh_proj.weight"].abs().max() > 1e-5


def test_labels_mask_the_loss(tiny):
    model, rows = build(tiny).train(), pattern(2, 9)
    model(rows, labels=torch.full_like(rows, -100)).logits.sum().mul(0).backward()
    assert not model.model.layers[3].eh_proj.weight.grad.any()


def test_logits_and_reported_loss_are_those_without(tiny, input_ids):
    with_mtp, without = build(tiny), build(tiny, mtp_loss_coef=0.0)
    without.load_state_dict(with_mtp.state_dict(), strict=False)
    for model in (with_mtp, without):
        model.train()
    assert torch.equal(with_mtp(input_ids, labels=input_ids).loss, without(input_ids, labels=input_ids).loss)
    assert torch.equal(with_mtp.eval()(input_ids).logits, without.eval()(input_ids).logits)
    clone = copy.deepcopy(with_mtp)
    assert clone.model.get_head() is clone.lm_head and clone.lm_head is not with_mtp.lm_head


def test_official_names_and_speculative_decoding(tiny, tmp_path):
    """Trained on a pattern, saved, loaded by transformers' own MTP decoder: same greedy text in fewer passes."""
    model = build(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = pattern(16)
    for _ in range(120):
        model.train()(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "self_attn.o_proj", "mlp.experts.7.up_proj"):
        assert f"model.layers.3.{name}.weight" in names and f"model.layers.4.{name}.weight" in names

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(loaded.model.layers) == 3
    passes = []
    loaded.model.register_forward_hook(lambda *_: passes.append(1))
    prompt = pattern(1, 6) + 1
    greedy = loaded.generate(prompt, max_new_tokens=30, do_sample=False)
    num_greedy = len(passes)
    with count_drafts(loaded) as drafts:
        speculative = loaded.generate(prompt, max_new_tokens=30, do_sample=False, use_mtp=True)
    assert torch.equal(greedy, speculative)
    num_passes = len(passes) - num_greedy
    assert num_passes < 0.7 * num_greedy, "drafts are accepted"
    # Witness: each pass writes one token and the accepted drafts; the first, over the prompt, has no drafts.
    assert drafts.num_passes == num_passes and drafts.num_accepted == 30 - num_passes
    assert drafts.num_drafted == 2 * (num_passes - 1) and 0.3 < drafts.acceptance_rate <= 1
    assert drafts.tokens_per_pass == pytest.approx(30 / num_passes)
    assert "_get_candidate_generator" not in vars(loaded), "nothing is left behind"


@pytest.mark.parametrize("depths", [1, 2])
def test_useless_drafts_change_no_text(tiny, tmp_path, depths):
    """A random model's drafts are mostly wrong; what it writes is the same."""
    build(tiny, num_nextn_predict_layers=depths).save_pretrained(tmp_path)
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path)
    prompt = pattern(1, 6)
    with count_drafts(loaded) as drafts:
        greedy = loaded.generate(prompt, max_new_tokens=20, do_sample=False)
        assert drafts.num_drafted == 0 and drafts.acceptance_rate == 0
        assert torch.equal(greedy, loaded.generate(prompt, max_new_tokens=20, do_sample=False, use_mtp=True))
    assert drafts.num_drafted == depths * (drafts.num_passes - 1) and drafts.acceptance_rate < 0.5
    assert f"of {drafts.num_drafted} drafted tokens accepted" in str(drafts)


def test_drafting_with_layers_in_training_is_refused(tiny, tmp_path):
    """transformers would speak of missing weights, or stop at an attribute."""
    model = build(tiny)
    model.save_pretrained(tmp_path)
    for trained in (model, DeepseekForCausalLM.from_pretrained(tmp_path, mtp_loss_coef=0.3)):
        with pytest.raises(ValueError, match="use_mtp: True is not allowed for a model that trains"):
            trained.eval().generate(pattern(1, 6), max_new_tokens=3, use_mtp=True)


def test_released_weights_load_and_save_unchanged(tiny, tmp_path):
    """Released checkpoints repeat embedding and head in each MTP layer; those copies are the model's own."""
    model = build(tiny, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    loaded, info = DeepseekForCausalLM.from_pretrained(tmp_path / "ours", mtp_loss_coef=0.1, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(tensors) - set(again) == {
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    }
    assert all(torch.equal(value, tensors[name]) for name, value in again.items())


def test_a_loss_without_layers_is_refused(tiny):
    with pytest.raises(ValueError, match="num_nextn_predict_layers: got 0, expected"):
        DeepseekConfig(**tiny, mtp_loss_coef=0.3)


def test_models_without_a_head_train_without_predicting_tokens(tiny):
    """Of a configuration with MTP, a classifier and the bare decoder have nothing to predict tokens with."""
    config = DeepseekConfig(**{**tiny, "num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3, "num_labels": 2})
    rows = pattern(2)
    classifier = DeepseekForSequenceClassification(config).train()
    classifier(input_ids=rows, labels=torch.tensor([0, 1])).loss.backward()
    assert classifier.score.weight.grad.abs().sum() > 0
    decoder = DeepseekModel(config).train()
    decoder(input_ids=rows).last_hidden_state.sum().backward()
    assert all(p.grad is None for layer in decoder.layers[config.num_hidden_layers :] for p in layer.parameters())
