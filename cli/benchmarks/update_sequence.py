"""One method's way through ``deepseek-moe bench update``: five updates of one model, measured after each.

All methods begin from the same model of a seed and train as many tokens in each update; what is replayed takes the
place of new text. Nothing is gated here: the table is about what methods do.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, set_seed

from deepseek_cli.benchmarks.update_texts import FIRST, LATER, LessonTexts
from deepseek_records.hashes import hash_tokenizer
from deepseek_training.continual.continued_training import build_trainer, mix_replay, prepare_method
from deepseek_training.continual.held_out_units import HeldOutUnits
from deepseek_training.continual.merge_weights import merge_tensors
from deepseek_training.continual.reservoir import Reservoir
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.recipes.update import UpdateRecipe
from deepseek_training.trainer.lora import merged
from deepseek_training.trainer.run_start import training_arguments

_REPLAY_BLOCKS = 1200


@dataclass(frozen=True)
class Method:
    """One way to update.

    Attributes:
        settings: Of `UpdateRecipe`.
        alpha: How far from the old weights to the trained ones the result lies.
        is_joint: Whether all texts are trained on at once, in as many steps.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    is_joint: bool = False


METHODS = {
    "naive": Method({"replay_share": 0.0}),
    "replay 10 %": Method({"replay_share": 0.1}),
    "replay 40 %": Method({"replay_share": 0.4}),
    "LoRA": Method({"replay_share": 0.0, "method": "lora", "learning_rate": 5e-3}),
    "ESFT": Method({"replay_share": 0.0, "method": "esft", "learning_rate": 5e-3}),
    "EWC": Method({"replay_share": 0.0, "ewc_weight": 1e5}),
    "merge": Method({"replay_share": 0.0}, alpha=0.5),
    "replay + merge": Method({"replay_share": 0.4}, alpha=0.5),
    "joint": Method({"replay_share": 0.0}, is_joint=True),
}


@dataclass(frozen=True)
class UpdateSequence:
    """What all methods of a seed share.

    Attributes:
        model: The first model.
        parts: Blocks by text, the first one's too.
        held_out: Held-out units by text.
        tokenizer: Hash.
        sequence_length: Tokens of a block.
    """

    model: PreTrainedModel
    parts: dict[str, PackedDataset]
    held_out: dict[str, HeldOutUnits]
    tokenizer: str
    sequence_length: int

    @classmethod
    def prepare(
        cls, model: PreTrainedModel, tokenizer: Any, texts: Sequence[LessonTexts], *, length: int, held_out_bytes: int
    ) -> "UpdateSequence":
        """Return the texts as a model takes them.

        Args:
            model: The first model.
            tokenizer: Its tokenizer.
            texts: The first one's and the later ones.
            length: Tokens of a block.
            held_out_bytes: Of each held-out set.
        """
        parts = {one.name: PackedDataset(encode_documents(one.train, tokenizer), length) for one in texts}
        sets = {one.name: HeldOutUnits.prepare(one.name, one.held_out, tokenizer, held_out_bytes) for one in texts}
        return cls(model, parts, sets, hash_tokenizer(tokenizer), length)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the bits per byte on each text."""
        found = {}
        for name, one in self.held_out.items():
            bits = one.measure(model, sequence_length=self.sequence_length, batch_size=32)
            found[name] = float(bits.sum() / one.num_bytes.sum())
        return found

    def run(self, method: Method, *, steps: int, seed: int, batch_size: int) -> list[dict[str, float]]:
        """Return the bits per byte on each text after each update; for joint training after all.

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
        reservoir = Reservoir({}, {}, _REPLAY_BLOCKS, self.tokenizer).add(FIRST, self.parts[FIRST], seed=seed)
        state, measured = self.model.state_dict(), []
        if method.is_joint:
            for name in LATER[1:]:
                reservoir = reservoir.add(name, self.parts[name], seed=seed)
            recipe.max_steps, recipe.replay_share = steps * len(LATER), 1 - 1 / (len(LATER) + 1)
            return [self.measure(self._update(recipe, state, LATER[0], reservoir))]
        for name in LATER:
            model = self._update(recipe, state, name, reservoir)
            new = model.state_dict()
            state = {key: merge_tensors(key, state[key], new[key], method.alpha).clone() for key in new}
            model.load_state_dict(state)
            measured.append(self.measure(model))
            reservoir = reservoir.add(name, self.parts[name], seed=seed)
        return measured

    def _update(
        self, recipe: UpdateRecipe, state: dict[str, torch.Tensor], name: str, reservoir: Reservoir
    ) -> PreTrainedModel:
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        with tempfile.TemporaryDirectory() as folder:
            args = training_arguments(recipe, Path(folder))
            recipe, dataset = mix_replay(recipe, self.parts[name], reservoir, args)
            adapted, esft = prepare_method(recipe, model, self.parts[name])
            set_seed(recipe.seed)
            trainer = build_trainer(recipe, adapted, dataset, args, esft=esft, reservoir=reservoir)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return merged(trainer.model)
