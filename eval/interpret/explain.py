"""Explains a model: the expert atlas, masked experts, and what drove its predictions; into ``explain.json``.

Called by ``deepseek-moe explain``, which brings the texts and draws the page
(`deepseek_model_cards.report.explain_page`).
"""

import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from deepseek_eval.interpret.ablation import Effect, estimate_effects, measure_effects, rank_experts
from deepseek_eval.interpret.atlas import Atlas, make_atlas, show_token
from deepseek_eval.interpret.attributions import Reading, attribute, encode_text, require_captum
from deepseek_eval.interpret.expert_sets import measure_sets
from deepseek_eval.interpret.faithfulness import Faithfulness, TextCurves, sum_up, trace_curves
from deepseek_eval.interpret.passages import Passage, cut_passages
from deepseek_eval.interpret.routed_tokens import RoutedTokens, find_layers, layer_number, read_routing
from deepseek_eval.interpret.router_parts import split_router_logits
from deepseek_eval.interpret.steered_router import check_expert
from deepseek_eval.model_loading import LoadedModel, load_model
from deepseek_records.hashes import hash_model, hash_tokenizer
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import DataUse, Result, Summary
from modeling_deepseek.families import MoeLayer

logger = logging.getLogger(__name__)

RESULT_FILE = "explain.json"


@dataclass(frozen=True)
class ExplainSettings:
    """What to explain, and on how much text.

    Attributes:
        texts: Texts whose next token and routing are explained.
        passages: Of each domain.
        length: Tokens of a passage.
        num_experts: How many experts to mask, those first that a gradient ranks highest.
        experts: Layer and number of experts to mask in place of those.
        set_size: How many experts that prefer a domain to mask together; 0: none; None: as `expert_sets` chooses.
        num_faithful: Texts on which the attributions are tested, drawn from the passages.
        faithful_length: Tokens of each.
        batch_size: Passages at once.
        seed: Of passages, shufflings and random orders.
        dtype: As for `load_model`, as are the next two.
        device: Where to run.
        trust_remote_code: Run code that comes with the checkpoint.
    """

    texts: tuple[str, ...] = ()
    passages: int = 24
    length: int = 128
    num_experts: int = 16
    experts: tuple[tuple[str, int], ...] = ()
    set_size: int | None = None
    num_faithful: int = 16
    faithful_length: int = 32
    batch_size: int = 16
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ValueError: One is.
        """
        for name, least in (
            ("passages", 2),
            ("length", 4),
            ("num_experts", 0),
            ("num_faithful", 0),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                option = {"num_experts": "experts", "num_faithful": "faithfulness"}.get(name, name)
                raise ValueError(f"--{option.replace('_', '-')}: got {getattr(self, name)}, expected at least {least}")
        if self.set_size is not None and self.set_size < 0:
            raise ValueError(f"--set-size: got {self.set_size}, expected at least 0")
        for text in self.texts:
            if not text.strip():
                raise ValueError("--text: got an empty text, expected at least two tokens")
        if self.texts:
            require_captum()


def explain(
    model_name_or_path: str | Path,
    domains: Mapping[str, Sequence[str]],
    settings: ExplainSettings,
    *,
    output: str | Path,
    overwrite: bool = False,
    data: Sequence[DataUse] = (),
) -> dict[str, Any]:
    """Explain a model and write ``explain.json`` and the summary into a run folder.

    Args:
        model_name_or_path: Checkpoint folder, run folder of ours, or Hub id; of any family with routed experts.
        domains: Documents by the domain's name.
        settings: What to do.
        output: The run folder.
        overwrite: Replace a run that is in the way.
        data: The domains as the summary names them.

    Returns:
        What ``explain.json`` holds.

    Raises:
        ValueError: A dense model, an expert or layer that is not there, a text of one token, Captum missing.
        FileNotFoundError: The model is missing.
    """
    settings.check()
    started = time.monotonic()
    recipe = {"model": str(model_name_or_path), "domains": list(domains), **asdict(settings)}
    recipe |= {"texts": list(settings.texts), "experts": [f"{layer}:{expert}" for layer, expert in settings.experts]}
    run = RunFolder.create(output, recipe, command="explain", seed=settings.seed, overwrite=overwrite)
    loaded = load_model(
        model_name_or_path,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    run.hold_to(model=hash_model(loaded.model), tokenizer=hash_tokenizer(loaded.tokenizer))
    layers = find_layers(loaded.model)
    asked = find_experts(layers, settings.experts)
    encoded = [encode_text(text, loaded.tokenizer, loaded.max_length) for text in settings.texts]
    for ids in encoded[:1]:
        Reading(loaded.model, ids)  # refused before the long part
    length = min(settings.length, loaded.max_length)
    passages = cut_passages(
        domains, loaded.tokenizer, num_passages=settings.passages, length=length, seed=settings.seed
    )
    routed = _read_routing(loaded, passages, settings)
    names = [layer_number(layer) for layer in layers]
    atlas = make_atlas(routed, passages, loaded.tokenizer, names, settings.seed)
    sets = measure_sets(
        loaded.model,
        layers,
        passages,
        routed,
        size=settings.set_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    effects = _mask_experts(loaded, layers, passages, asked, settings)
    texts = [_explain_text(loaded, ids, settings.seed) for ids in tqdm(encoded, desc="texts", disable=not encoded)]
    faithfulness = _test_attributions(loaded, passages, settings)
    seconds = time.monotonic() - started
    found: dict[str, Any] = {
        "format": 1,
        "model": str(model_name_or_path),
        "architecture": type(loaded.model).__name__,
        "settings": recipe,
        "atlas": asdict(atlas),
        "ablation": [asdict(effect) for effect in effects],
        "sets": [asdict(one) for one in sets],
        "texts": texts,
        "faithfulness": None if faithfulness is None else asdict(faithfulness),
        "seconds": seconds,
    }
    write_json(run.path / RESULT_FILE, found)
    results = _result_rows(atlas)
    run.finish(
        Summary(stage="explain", model=str(model_name_or_path), results=results, data=tuple(data), seconds=seconds)
    )
    return found


def find_experts(layers: Sequence[MoeLayer], asked: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """Return the place in `layers` and the number of each expert that a user names.

    Args:
        layers: Of the model.
        asked: Number of the layer in the model, and of the expert.

    Raises:
        ValueError: There is no such layer or expert.
    """
    names = [layer_number(layer) for layer in layers]
    for layer, expert in asked:
        if layer not in names:
            raise ValueError(f"--mask: got layer {layer}, expected one with routed experts: {', '.join(names)}")
        check_expert(layers[names.index(layer)], expert)
    return [(names.index(layer), expert) for layer, expert in asked]


def _read_routing(loaded: LoadedModel, passages: Sequence[Passage], settings: ExplainSettings) -> RoutedTokens:
    with tqdm(total=len(passages), desc="atlas", unit="passage") as bar:
        return read_routing(loaded.model, passages, batch_size=settings.batch_size, tell=bar.update)


def _mask_experts(
    loaded: LoadedModel,
    layers: Sequence[MoeLayer],
    passages: Sequence[Passage],
    asked: Sequence[tuple[int, int]],
    settings: ExplainSettings,
) -> list[Effect]:
    if not asked and not settings.num_experts:
        return []
    estimates = estimate_effects(loaded.model, layers, passages, settings.batch_size)
    experts = list(asked) or rank_experts(estimates)[: settings.num_experts]
    with tqdm(total=len(experts), desc="masked experts", unit="expert") as bar:
        return measure_effects(
            loaded.model,
            layers,
            passages,
            experts,
            estimates,
            batch_size=settings.batch_size,
            tell=bar.update,
        )


def _explain_text(loaded: LoadedModel, ids: np.ndarray, seed: int) -> dict[str, Any]:
    """What drove the next token after a text, and its last token's choices of experts."""
    reading = Reading(loaded.model, ids)
    attribution = attribute(reading, reading.next_token_target)
    choices = []
    for place, layer in enumerate(reading.layers):
        weights, experts = reading.weights[place], reading.experts[place]
        first = int(experts[-1, weights[-1].argmax()])
        parts = split_router_logits(reading, place)
        choices.append(
            {
                "layer": layer_number(layer),
                "experts": experts.tolist(),
                "weights": [[round(one, 5) for one in row] for row in weights.tolist()],
                "expert": first,
                "attribution": asdict(attribute(reading, reading.router_target(place, first))),
                "parts": None
                if parts is None
                else {
                    "names": parts.names,
                    "values": parts.parts[-1, first].tolist(),
                    "logit": float(parts.logits[-1, first]),
                    "error": parts.error,
                },
            }
        )
    return {
        "tokens": [show_token(loaded.tokenizer, int(one)) for one in ids],
        "next_token": show_token(loaded.tokenizer, reading.next_token),
        "attribution": asdict(attribution),
        "choices": choices,
        "curves": asdict(trace_curves(reading, attribution, seed)),
    }


def _test_attributions(
    loaded: LoadedModel, passages: Sequence[Passage], settings: ExplainSettings
) -> Faithfulness | None:
    """Over beginnings of passages, as many of each domain; None without Captum, or where it cannot be done."""
    if not settings.num_faithful or importlib.util.find_spec("captum") is None:
        return None
    by_domain: dict[str, list[Passage]] = {}
    for passage in passages:
        if len(passage.token_ids) > 3:
            by_domain.setdefault(passage.domain, []).append(passage)
    rounds = zip(*(rows + [None] * (settings.passages - len(rows)) for rows in by_domain.values()), strict=True)
    chosen = [passage for row in rounds for passage in row if passage is not None][: settings.num_faithful]
    curves: list[TextCurves] = []
    errors = []
    for number, passage in enumerate(tqdm(chosen, desc="faithfulness", unit="text")):
        try:
            reading = Reading(loaded.model, passage.token_ids[: settings.faithful_length])
        except ValueError as error:
            logger.warning("no attributions: %s", str(error).removeprefix("--text: "))
            return None
        attribution = attribute(reading, reading.next_token_target)
        errors.append(attribution.error)
        curves.append(trace_curves(reading, attribution, settings.seed + number))
    return sum_up(curves, errors, settings.seed) if curves else None


def _result_rows(atlas: Atlas) -> tuple[Result, ...]:
    return tuple(
        Result(
            metric="expert_domain_bits",
            value=layer.domain.bits,
            stderr=layer.domain.stderr,
            n=sum(atlas.num_documents),
            dataset=f"{', '.join(atlas.domains)}, layer {layer.layer}",
        )
        for layer in atlas.layers
        if layer.domain is not None
    )
