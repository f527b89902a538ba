"""Smaller variants of one model, each in a folder of its own: rounded experts, fewer experts, healed ones, and both.

`smaller.py` measures them. All but the original are stored in bf16 beside what is rounded, as models are handed on; so
sizes compare. A stage's run that is finished is taken as it is.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_serving.edge.decoder_graph import check_exportable
from deepseek_serving.edge.onnx_decoder import open_session, run_without_cache
from deepseek_serving.edge.onnx_export import GRAPHS, check_size, write_graphs
from deepseek_serving.edge.packages import check_onnx_packages
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.recipes.shrink import ShrinkSettings
from deepseek_training.stages.distill import distill
from deepseek_training.stages.quantize import quantize
from deepseek_training.stages.shrink import shrink

ORIGINAL, ROUNDED, CUT, HEALED, BOTH = (
    "as it is",
    "rounded",
    "experts cut",
    "cut and healed",
    "cut, healed, int4 by AWQ",
)
# Least that the stages take: what they measure on the way is not used here.
_EVAL_BYTES = 1000
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model that is there.

    Attributes:
        name: As printed.
        kind: One of the five above.
        path: A checkpoint folder, or a graph for onnxruntime.
        label: Its name among those of its kind, short enough for a picture.
    """

    name: str
    kind: str
    path: Path
    label: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights' files."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    def load(self) -> nn.Module:
        """Return the model as it is stored."""
        return OnnxModel(self.path) if self.path.is_file() else load_model(self.path, dtype="auto")


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Makes the variants.

    Attributes:
        model: The original: a folder or Hub id.
        folder: Where variants go.
        rounding: Group and calibration text of the rounded ones.
        cuts: Shares of the experts to cut, in percent.
        healing: The recipe; teacher, start and cache are filled in.
    """

    model: str
    folder: Path
    rounding: QuantizeSettings
    cuts: Sequence[int]
    healing: DistillRecipe

    def make(self) -> Iterator[Variant]:
        """Make one variant after another; the original comes first."""
        original = self._store("original", self.model, "auto")
        dtype = str(load_model(original, dtype="auto").dtype).removeprefix("torch.")
        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)
        yield Variant(f"{short}, the original", ORIGINAL, original, short)
        half = original
        if short != "bf16":
            half = self._store("bf16", original, torch.bfloat16)
            yield Variant("bf16", ORIGINAL, half, "bf16")
        yield from self._in_8_bits(original)
        yield Variant("int4 to nearest", ROUNDED, self._round("int4-nearest", half, grid=0, clip=False), "nearest")
        yield Variant("int4 by AWQ", ROUNDED, self._round("int4-awq", half, clip=False), "AWQ")
        yield Variant("int4 by AWQ with clipping", ROUNDED, self._round("int4-awq-clip", half), "AWQ, clipped")
        trained = self._heal("none-cut", original, original)
        yield Variant("none cut, trained as the healed ones", HEALED, self._half("none-cut", trained), "none cut")
        for percent in self.cuts:
            name = f"cut-{percent}"
            cut = self._cut(name, original, percent)
            yield Variant(f"{percent} % cut", CUT, self._half(name, cut), f"{percent} % cut")
            name = f"healed-{percent}"
            healed = self._half(name, self._heal(name, original, cut))
            yield Variant(f"{percent} % cut, healed", HEALED, healed, f"{percent} % cut")
            both = self._round(f"{name}-int4", healed)
            yield Variant(f"{percent} % cut, healed, int4 by AWQ with clipping", BOTH, both, f"{percent} % cut")

    def _store(self, name: str, source: str | Path, dtype: Any) -> Path:
        """A copy of a model in another number format."""
        path = self.folder / name / "model"
        load_model(source, dtype=dtype).save_pretrained(path)
        load_tokenizer(source).save_pretrained(path)
        return path

    def _half(self, name: str, source: Path) -> Path:
        return self._store(f"{name}-bf16", source, torch.bfloat16)

    def _in_8_bits(self, original: Path) -> Iterator[Variant]:
        """The graph for onnxruntime, where that and the model allow it."""
        model = load_model(original, dtype=torch.float32)
        try:
            check_onnx_packages()
            check_exportable(model, 1.0)
            check_size(model)
        except ValueError as error:
            print(f"8 bits for onnxruntime: left out, {error}", flush=True)
            return
        names = [name for name in GRAPHS if "without_cache" in name]
        folder = self.folder / "int8-onnx"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / names[1]).exists():
            write_graphs(model, folder, names[:1])
            write_graphs(model, folder, names[1:])
        yield Variant("int8 of all matrices, ONNX", ROUNDED, folder / names[1], "int8, ONNX")

    def _round(self, name: str, source: Path, **options: Any) -> Path:
        settings = dataclasses.replace(self.rounding, model=str(source), eval_bytes=_EVAL_BYTES, **options)
        run = RunFolder(self.folder / name)
        if not run.is_finished:
            quantize(settings, run.path)
        return run.model_path

    def _cut(self, name: str, source: Path, percent: int) -> Path:
        settings = ShrinkSettings(
            model=str(source),
            student=cut_settings(load_model(source, dtype="auto").config, percent),
            data=self.healing.data,
            data_column=self.healing.data_column,
            calibration_tokens=self.healing.calibration_tokens,
            sequence_length=self.healing.sequence_length,
            eval_bytes=_EVAL_BYTES,
        )
        run = RunFolder(self.folder / name)
        if not run.is_finished:
            shrink(settings, run.path)
        return run.model_path

    def _heal(self, name: str, teacher: Path, start: Path) -> Path:
        run = RunFolder(self.folder / name)
        if not run.is_finished:
            distill(heal_recipe(self.healing, teacher, start, self.folder / "cache"), run.path)
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        return run.model_path


class OnnxModel(nn.Module):
    """A graph without cache, asked as a causal language model is.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = open_session(path)
        self.register_parameter("nowhere", nn.Parameter(torch.zeros(0)))  # tells the device
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return the logits `[B, S, vocabulary]`, row by row: gathered experts take memory."""
        rows = [torch.from_numpy(run_without_cache(self.session, row[None].numpy())) for row in input_ids]
        return SimpleNamespace(logits=torch.cat(rows))


def cut_settings(config: Any, percent: int) -> dict[str, int]:
    """Return the setting of a configuration without a share of its routed experts.

    Args:
        config: The model's.
        percent: To cut.

    Raises:
        ValueError: It counts no experts, or the share would leave none or all.
    """
    known = config.get_text_config().to_dict()
    name = next((name for name in _EXPERT_COUNTS if known.get(name)), None)
    if name is None:
        raise ValueError(f"model: got {config.model_type}, expected a model with routed experts")
    left = round(known[name] * (1 - percent / 100))
    if not 0 < left < known[name]:
        raise ValueError(f"cuts: got {percent}, expected a share that leaves some of the {known[name]} experts")
    return {name: left}


def heal_recipe(recipe: DistillRecipe, teacher: Path, start: Path, cache: Path) -> DistillRecipe:
    """Return the recipe that heals one model.

    Args:
        recipe: The settings of all.
        teacher: The original.
        start: What was cut out of it.
        cache: Folder of the teacher's distributions; without a teacher there is none.
    """
    return dataclasses.replace(
        recipe,
        teacher=str(teacher),
        start=str(start),
        student={},
        cache=str(cache) if recipe.distill_weight else None,
        min_gap_closed=None,
        eval_bytes=_EVAL_BYTES,
    )
