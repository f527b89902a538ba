"""One method's way through ``deepseek-moe bench update``: five updates of one model, measured after each.

All methods begin from the same model of a seed and train as many tokens in each update; what is replayed takes the
place of new text. Only the gated row has a gate, that of ``deepseek-moe update``: it picks among candidates and may
refuse, on held-out text of its own, which the table's figures do not stand on.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PrinterCallback, set_seed

from deepseek_cli.benchmarks.update_texts import FIRST, LATER, LessonTexts
from deepseek_cli.router_drift import measure_router_drift
from deepseek_records.hashes import hash_tokenizer
from deepseek_training.continual.continued_training import build_trainer, mix_replay, prepare_method
from deepseek_training.continual.decision import Gate, GateSets
from deepseek_training.continual.held_out_units import HeldOutUnits
from deepseek_training.continual.merge_weights import merge_tensors, merge_weights
from deepseek_training.continual.reservoir import Reservoir
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.recipes.update import UpdateRecipe
from deepseek_training.trainer.lora import merged
from deepseek_training.trainer.run_start import training_arguments

_REPLAY_BLOCKS = 1200
_BATCH_OF_MEASURING, _UNITS_OF_DRIFT = 32, 24
# Of a gate's decision, what the table's file keeps.
_TOLD = ("accepted", "alpha", "why", "findings")


@dataclass(frozen=True)
class Method:
    """One way to update.

    Attributes:
        settings: Of `UpdateRecipe`.
        alpha: How far from the old weights to the trained ones the result lies.
        is_joint: Whether all texts are trained on at once, in as many steps.
        is_gated: Whether the gate picks the alpha, and decides; `alpha` says nothing then.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    is_joint: bool = False
    is_gated: bool = False


METHODS = {
    "naive": Method({"replay_share": 0.0}),
    "replay 10 %": Method({"replay_share": 0.1}),
    "replay 40 %": Method({"replay_share": 0.4}),
    "LoRA": Method({"replay_share": 0.0, "method": "lora", "learning_rate": 5e-3}),
    "ESFT": Method({"replay_share": 0.0, "method": "esft", "learning_rate": 5e-3}),
    "EWC": Method({"replay_share": 0.0, "ewc_weight": 1e5}),
    "merge": Method({"replay_share": 0.0}, alpha=0.5),
    "replay + merge": Method({"replay_share": 0.4}, alpha=0.5),
    "replay + gate": Method({"replay_share": 0.4, "safety_prompts": 8}, is_gated=True),
    "joint": Method({"replay_share": 0.0}, is_joint=True),
}


@dataclass(frozen=True)
class Updated:
    """What one update came to.

    Attributes:
        bits: Bits per byte on each text.
        drift: By text, how far the routers moved in this update: KL of expert load in nats, less what chance gives,
            mean over layers. Empty before the first update.
        gate: What the gate said; empty without one.
    """

    bits: dict[str, float]
    drift: dict[str, float] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateSequence:
    """What all methods of a seed share.

    Attributes:
        model: The first model.
        parts: Blocks by text, the first one's too.
        held_out: Held-out units by text, for the figures.
        of_gate: Other held-out units by text, for the gate.
        tokenizer: The model's.
        sequence_length: Tokens of a block.
    """

    model: PreTrainedModel
    parts: dict[str, PackedDataset]
    held_out: dict[str, HeldOutUnits]
    of_gate: dict[str, HeldOutUnits]
    tokenizer: Any
    sequence_length: int

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[LessonTexts],
        *,
        length: int,
        held_out_bytes: int,
        gate_bytes: int,
    ) -> "UpdateSequence":
        """Return the texts as a model takes them.

        Args:
            model: The first model.
            tokenizer: Its tokenizer.
            texts: The first one's and the later ones.
            length: Tokens of a block.
            held_out_bytes: Of each held-out set.
            gate_bytes: Of each of the gate's.
        """
        parts = {one.name: PackedDataset(encode_documents(one.train, tokenizer), length) for one in texts}

        def units(name: str, documents: Sequence[str], num_bytes: int) -> HeldOutUnits:
            return HeldOutUnits.prepare(name, documents, tokenizer, num_bytes)

        held_out = {one.name: units(one.name, one.held_out, held_out_bytes) for one in texts}
        of_gate = {one.name: units(one.name, one.of_gate, gate_bytes) for one in texts}
        return cls(model, parts, held_out, of_gate, tokenizer, length)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the bits per byte on each text."""
        found = {}
        for name, one in self.held_out.items():
            bits = one.measure(model, sequence_length=self.sequence_length, batch_size=_BATCH_OF_MEASURING)
            found[name] = float(bits.sum() / one.num_bytes.sum())
        return found

    def run(self, method: Method, *, steps: int, seed: int, batch_size: int) -> list[Updated]:
        """Return what each update came to; for joint training, all of them together.

        Args:
            method: How.
            steps: Of each update.
            seed: Of the data's order.
            batch_size: Blocks of a step.
        """
        settings: dict[str, Any] = {
            **{"data": "new", "model": "old", "epochs": None, "max_steps": steps, "batch_size": batch_size},
            **{"learning_rate": 2e-3, "warmup_steps": min(5, steps), "seed": seed, "report_to": []},
            "sequence_length": self.sequence_length,
        }
        recipe = UpdateRecipe(**{**settings, **method.settings})
        reservoir = Reservoir({}, {}, _REPLAY_BLOCKS, hash_tokenizer(self.tokenizer))
        reservoir = reservoir.add(FIRST, self.parts[FIRST], seed=seed)
        old, taught, found = self.model, [FIRST], []
        if method.is_joint:
            for name in LATER[1:]:
                reservoir = reservoir.add(name, self.parts[name], seed=seed)
            recipe.max_steps, recipe.replay_share = steps * len(LATER), 1 - 1 / (len(LATER) + 1)
            model = self._update(recipe, old, LATER[0], reservoir)
            return [Updated(self.measure(model), self._drift(old, model))]
        for name in LATER:
            model, gate = self._update(recipe, old, name, reservoir), {}
            if method.is_gated:
                gate = self._decide(recipe, old, model, name, taught)
            alpha = method.alpha if not method.is_gated else gate["alpha"] * gate["accepted"]
            model = _between(old, model, alpha)
            found.append(Updated(self.measure(model), self._drift(old, model), gate))
            if alpha:
                taught.append(name)
                reservoir = reservoir.add(name, self.parts[name], seed=seed)
            old = model
        return found

    def _decide(
        self, recipe: UpdateRecipe, old: PreTrainedModel, new: PreTrainedModel, name: str, taught: Sequence[str]
    ) -> dict[str, Any]:
        """What the gate of `deepseek_training.stages.update` says of the recipe's candidates."""
        with tempfile.TemporaryDirectory() as root:
            before, after = Path(root, "old"), Path(root, "new")
            for model, folder in ((old, before), (new, after)):
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            candidates = {
                alpha: merge_weights(before, after, Path(root) / f"alpha-{alpha:g}", alpha) for alpha in recipe.alphas
            }
            sets = GateSets(self.of_gate[name], [self.of_gate[one] for one in taught])
            gate = Gate(recipe, sets, self.tokenizer, training_arguments(recipe, Path(root) / "args"))
            decision = gate.decide(before, candidates)
        return {key: decision[key] for key in _TOLD}

    def _drift(self, old: PreTrainedModel, new: PreTrainedModel) -> dict[str, float]:
        sets = [dataclasses.replace(one, documents=one.documents[:_UNITS_OF_DRIFT]) for one in self.held_out.values()]
        rows = measure_router_drift(old, new, sets)
        return {
            name: float(np.mean([row["corrected"] for row in rows if row["dataset"] == name]))
            for name in self.held_out
        }

    def _update(self, recipe: UpdateRecipe, old: PreTrainedModel, name: str, reservoir: Reservoir) -> PreTrainedModel:
        model = copy.deepcopy(old)
        with tempfile.TemporaryDirectory() as folder:
            args = training_arguments(recipe, Path(folder))
            recipe, dataset = mix_replay(recipe, self.parts[name], reservoir, args)
            adapted, esft = prepare_method(recipe, model, self.parts[name])
            set_seed(recipe.seed)
            trainer = build_trainer(recipe, adapted, dataset, args, esft=esft, reservoir=reservoir)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return merged(trainer.model)


def _between(old: PreTrainedModel, new: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """A model so far from the old one to the new one, with nothing of its training about it."""
    model, former = copy.deepcopy(old), old.state_dict()
    model.load_state_dict(
        {name: merge_tensors(name, former[name], value, alpha) for name, value in new.state_dict().items()}
    )
    return model.eval()
