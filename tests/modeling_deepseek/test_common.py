"""What transformers' own common model tests ask of a causal language model, asked of our three classes.

Those tests are not in the installed package; these are the same questions in our own words, for DeepSeek-V3's router
and for everything of ours at once.
"""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from deepseek_records.activation_checkpointing import disable_checkpointing, enable_checkpointing, uses_checkpointing
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekModel

CLASSES = (DeepseekModel, DeepseekForCausalLM, DeepseekForSequenceClassification)
OURS = {
    **{"scoring_func": "softmax", "min_experts_per_tok": 1, "router_key_dim": 6, "norm_type": "layernorm"},
    **{"hidden_dropout": 0.1, "n_group": 1},
}
VARIANTS = {"sigmoid, fixed k": {}, "softmax, dynamic k, keys, layernorm": OURS}
MASKED_LENGTHS = (13, 9)


@pytest.fixture(params=VARIANTS)
def config(tiny, request) -> DeepseekConfig:
    return DeepseekConfig(**{**tiny, "num_labels": 3, "initializer_range": 0.1, **VARIANTS[request.param]})


@pytest.fixture
def mask():
    return torch.tensor([[1] * n + [0] * (13 - n) for n in MASKED_LENGTHS])


def build(cls, config, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return cls(config).eval()


def main_output(output) -> torch.Tensor:
    """The logits, or for the bare decoder its last hidden states."""
    return output.logits if "logits" in output else output.last_hidden_state


def labels_for(cls, input_ids):
    return torch.tensor([0, 2]) if cls is DeepseekForSequenceClassification else input_ids.clone()


@torch.no_grad()
def run(model, input_ids, **inputs) -> torch.Tensor:
    return main_output(model(input_ids, **inputs))


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_and_loaded_alike(cls, config, input_ids, tmp_path):
    model = build(cls, config)
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not loaded.training
    assert torch.equal(run(loaded, input_ids), run(model, input_ids))
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_the_bodys_weights_load_with_and_without_the_head(cls, config, input_ids, tmp_path):
    whole, body = build(cls, config), build(DeepseekModel, config)
    whole.save_pretrained(tmp_path / "whole")
    loaded = DeepseekModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(run(loaded, input_ids), run(whole.base_model, input_ids))
    if cls is DeepseekForSequenceClassification:
        body.save_pretrained(tmp_path / "body")
        loaded, info = cls.from_pretrained(tmp_path / "body", output_loading_info=True)
        assert info["missing_keys"] == {"score.weight"}
        assert torch.equal(run(loaded.base_model, input_ids), run(body, input_ids))


def test_a_head_of_another_size_is_refused_or_made_anew(config, input_ids, tmp_path):
    build(DeepseekForSequenceClassification, config).save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"score\.weight|ignore_mismatched_sizes"):
        DeepseekForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = DeepseekForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert run(model, input_ids).shape == (2, 5)


def test_a_configuration_survives_json_and_keeps_labels(config, tmp_path):
    config.save_pretrained(tmp_path)
    again = DeepseekConfig.from_pretrained(tmp_path)
    # The Auto classes and the moment of saving are written at saving.
    drop = {"auto_map", "transformers_version", "_name_or_path"}
    left = {k: v for k, v in config.to_dict().items() if k not in drop}
    assert left == {k: v for k, v in again.to_dict().items() if k not in drop}
    assert again.num_labels == 3 and DeepseekConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("cls", CLASSES)
def test_no_tensor_is_outside_parameters_and_buffers(cls, config):
    for name, module in build(cls, config).named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not loose, f"{name}: {loose}"


@pytest.mark.parametrize("cls", CLASSES)
def test_born_on_the_meta_device_and_filled_from_a_state(cls, config, input_ids):
    model = build(cls, config)
    with torch.device("meta"):
        empty = cls(copy.deepcopy(config))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    filled = cls.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(run(filled, input_ids), run(model, input_ids))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_is_initialized(cls, config):
    """Two births from different garbage are equal: nothing is left as memory had it."""
    births = []
    for garbage in (7.0, -3.0):
        model = build(cls, config)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and "inv_freq" not in repr(tensor):
                tensor.data.fill_(garbage)
        for module in model.modules():
            module._is_hf_initialized = False
        for parameter in model.parameters():
            parameter._is_hf_initialized = False
        torch.manual_seed(5)
        model.init_weights()
        births.append(model.state_dict())
    left = [name for name in births[0] if not torch.equal(births[0][name], births[1][name])]
    assert left == []


@pytest.mark.parametrize("cls", CLASSES)
def test_equal_inputs_give_equal_outputs_in_every_form(cls, config, input_ids, mask):
    model = build(cls, config)
    first = run(model, input_ids, attention_mask=mask)
    assert torch.equal(first, run(model, input_ids, attention_mask=mask))
    with torch.no_grad():
        as_tuple = model(input_ids, attention_mask=mask, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], first)
    embeddings = model.get_input_embeddings()(input_ids)
    if cls is not DeepseekForSequenceClassification:  # which finds the last token by its id
        assert torch.equal(run(model, None, inputs_embeds=embeddings, attention_mask=mask), first)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_rows_output_does_not_depend_on_the_batch(cls, config, input_ids):
    model = build(cls, config)
    together = run(model, input_ids)
    alone = torch.cat([run(model, row[None]) for row in input_ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(config, input_ids, side):
    model = build(DeepseekForCausalLM, config)
    pad = torch.zeros(2, 4, dtype=torch.long)
    parts = (pad, input_ids) if side == "left" else (input_ids, pad)
    ones = torch.ones_like(input_ids)
    attention_mask = torch.cat((pad, ones) if side == "left" else (ones, pad), 1)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = run(model, torch.cat(parts, 1), attention_mask=attention_mask, position_ids=position_ids)
    kept = logits[:, 4:] if side == "left" else logits[:, :-4]
    torch.testing.assert_close(kept, run(model, input_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_sdpa_equals_eager_and_can_be_changed_at_run_time(cls, config, input_ids, mask):
    model = build(cls, config)
    outputs = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        outputs[name] = run(model, input_ids, attention_mask=mask)
    if cls is DeepseekForSequenceClassification:
        torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-5, rtol=1e-5)
    else:  # what padding itself computes is nobody's business
        keep = mask.bool()
        torch.testing.assert_close(outputs["eager"][keep], outputs["sdpa"][keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_hidden_states_attentions_and_router_logits_have_their_shapes(cls, config, input_ids):
    model = build(cls, config)
    model.set_attn_implementation("eager")
    flags = {"output_hidden_states": True, "output_attentions": True}
    output = model(input_ids, **flags)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 13, config.hidden_size)] * (layers + 1)
    assert [tuple(a.shape) for a in output.attentions] == [(2, heads, 13, 13)] * layers
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, heads, 13))
    for name, value in flags.items():
        setattr(model.config, name, value)
    by_config = model(input_ids)
    assert len(by_config.hidden_states) == layers + 1 and len(by_config.attentions) == layers
    for kept in (output.hidden_states[0], output.attentions[0]):
        kept.retain_grad()
    main_output(output).sum().backward()
    assert output.hidden_states[0].grad is not None and output.attentions[0].grad is not None


@pytest.mark.parametrize("cls", CLASSES[1:])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_reaches_every_parameter(cls, config, input_ids, checkpointing):
    """`checkpointing` is ``use_reentrant``, or None for none; every expert gets tokens, or has no gradient to show."""
    model = build(cls, config, num_experts_per_tok=4, min_experts_per_tok=None).train()
    if checkpointing is not None:
        enable_checkpointing(model, {"use_reentrant": checkpointing})
        assert uses_checkpointing(model)
        model.enable_input_require_grads()
    model(input_ids, labels=labels_for(cls, input_ids)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    # Sequence classification reads one token per row, so the last layer's unreached parts are allowed.
    assert still == [] or cls is DeepseekForSequenceClassification
    if checkpointing is not None:
        disable_checkpointing(model)
        assert not uses_checkpointing(model)


def test_it_learns_one_batch_by_heart(config, input_ids):
    model = build(DeepseekForCausalLM, config, hidden_dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    written = model.eval().generate(input_ids[:1, :4], max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert written[0].tolist() == input_ids[0].tolist()


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        ("regression", torch.tensor([[0.5, 1, 2], [0, 0, 1]])),
    ],
)
def test_kinds_of_classification(config, input_ids, problem, labels):
    model = build(DeepseekForSequenceClassification, config, problem_type=problem)
    output = model(input_ids, labels=labels)
    witness = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem]
    torch.testing.assert_close(output.loss, witness(output.logits, labels))


def test_labels_are_shifted_once_and_shifted_ones_are_taken(config, input_ids):
    model = build(DeepseekForCausalLM, config)
    output = model(input_ids, labels=input_ids)
    witness = torch.nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 97), input_ids[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, witness)
    shifted = torch.nn.functional.pad(input_ids, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(input_ids, shift_labels=shifted, labels=input_ids).loss, witness)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [110, 90])
def test_embeddings_are_resized(config, input_ids, tied, size, tmp_path):
    model = build(DeepseekForCausalLM, config, tie_word_embeddings=tied)
    input_ids = input_ids.clamp(max=80)
    before = run(model, input_ids)
    resized = model.resize_token_embeddings(size)
    assert resized.weight.shape[0] == model.config.vocab_size == size == run(model, input_ids).shape[-1]
    keep = min(size, 97)
    torch.testing.assert_close(run(model, input_ids)[..., :keep], before[..., :keep])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model(input_ids, labels=input_ids).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(DeepseekForCausalLM.from_pretrained(tmp_path), input_ids), run(model, input_ids))


def test_tied_weights_are_one_tensor_stored_once(config, input_ids, tmp_path):
    from safetensors.torch import load_file

    model = build(DeepseekForCausalLM, config, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = DeepseekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(run(loaded, input_ids), run(model, input_ids))


@pytest.mark.parametrize("cls", CLASSES)
def test_embeddings_can_be_replaced_and_inputs_are_named(cls, config, input_ids):
    model = build(cls, config)
    model.set_input_embeddings(torch.nn.Embedding(97, config.hidden_size))
    assert model.get_input_embeddings() is model.base_model.embed_tokens
    assert next(iter(inspect.signature(cls.forward).parameters)) == "self"
    assert model.main_input_name == "input_ids" and model.base_model_prefix == "model"
    assert "input_ids" in inspect.signature(cls.forward).parameters


# transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(DeepseekForCausalLM.forward).parameters else "past_key_values"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 1, "return_dict_in_generate": True},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_greedy_text_is_the_same_however_it_is_made(config, input_ids, options):
    model = build(DeepseekForCausalLM, config)
    # Witness: no cache and no `generate` at all.
    row = input_ids[:1]
    for _ in range(8):
        row = torch.cat([row, run(model, row)[:, -1:].argmax(-1)], 1)
    written = model.generate(input_ids[:1], **GREEDY, **options)
    assert torch.equal(written if isinstance(written, torch.Tensor) else written.sequences, row)


def test_decoding_goes_on_from_a_cache_from_embeddings_and_from_a_padded_batch(config, input_ids):
    model = build(DeepseekForCausalLM, config)
    expected = model.generate(input_ids, **GREEDY)
    half = model.generate(input_ids, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True)
    rest = model.generate(half.sequences, **{CACHE: half[CACHE]}, **{**GREEDY, "max_new_tokens": 5})
    assert torch.equal(rest, expected)
    embeddings = model.get_input_embeddings()(input_ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected[:, 13:])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), input_ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(input_ids)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], expected)


def test_a_caches_layers_have_the_shapes_that_generate_counts_on(config, input_ids):
    model = build(DeepseekForCausalLM, config)
    cache = model(input_ids, **{CACHE: DynamicCache(config=config)}, use_cache=True)[CACHE]
    assert len(cache) == config.num_hidden_layers and cache.get_seq_length() == 13
    cache.crop(-4)
    again = model(input_ids[:, 9:], **{CACHE: cache}, position_ids=torch.arange(9, 13)[None])
    torch.testing.assert_close(again.logits, run(model, input_ids)[:, 9:], atol=1e-5, rtol=1e-5)
    kept = run(model, input_ids, logits_to_keep=2)
    torch.testing.assert_close(kept, run(model, input_ids)[:, -2:])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "sampling beams"],
)
def test_other_ways_of_decoding_report_scores_and_repeat_under_a_seed(config, input_ids, options):
    model = build(DeepseekForCausalLM, config)
    model.generation_config.eos_token_id = None  # else generate takes it for the None below
    settings = GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=None, **options)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        runs.append(model.generate(input_ids, generation_config=settings, **flags))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    rows = 2 * options.get("num_return_sequences", 1)
    assert runs[0].sequences.shape == (rows, 18) and len(runs[0].scores) == len(runs[0].logits) == 5
    if options.get("num_beams") and not options["do_sample"]:
        # Witness: the likelihood of the text, without `generate`; the score is its mean over the 5 tokens.
        logps = run(model, runs[0].sequences).log_softmax(-1)[:, 12:-1]
        total = logps.gather(-1, runs[0].sequences[:, 13:, None]).sum((1, 2))
        torch.testing.assert_close(runs[0].sequences_scores, total / 5, atol=1e-4, rtol=1e-4)


def test_a_second_model_may_draft(config, input_ids):
    model, draft = build(DeepseekForCausalLM, config), build(DeepseekForCausalLM, config, num_hidden_layers=2)
    row = input_ids[:1]
    assert torch.equal(model.generate(row, assistant_model=draft, **GREEDY), model.generate(row, **GREEDY))
