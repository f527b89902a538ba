"""A checkpoint's tensors under llama.cpp's names, one at a time. `gguf_export` writes them into a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from deepseek_serving.gguf_blocks import q4_0_blocks


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint by name, read when asked for.

    Args:
        files: The file that holds each tensor.
    """

    files: dict[str, Path]

    @classmethod
    def of(cls, model_path: Path) -> "Tensors":
        """Return the tensors of a folder.

        Args:
            model_path: A folder with ``*.safetensors``.

        Raises:
            ValueError: A file is cut short.
        """
        files = {}
        for path in filter(Path.is_file, sorted(model_path.glob("*.safetensors"))):
            try:
                with safe_open(path, "pt") as opened:
                    files.update(dict.fromkeys(opened.keys(), path))
            except SafetensorError as error:
                raise ValueError(f"model: {path} is cut short or damaged ({error})") from None
        return cls(files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise ValueError(f"model: the checkpoint lacks {name}")
        with safe_open(self.files[name], "pt") as opened:
            return opened.get_tensor(name)


def convert_tensors(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the file under llama.cpp's name, in the order of the layers.

    Args:
        tensors: The checkpoint.
        config: Its configuration.
    """
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"].float()
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    yield "output.weight", tensors[head]
    for i in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{i}.", f"blk.{i}."
        yield f"{target}attn_norm.weight", tensors[f"{source}input_layernorm.weight"].float()
        yield f"{target}ffn_norm.weight", tensors[f"{source}post_attention_layernorm.weight"].float()
        yield from _convert_attention(tensors, f"{source}self_attn.", target, config)
        if i < config["first_k_dense_replace"]:
            yield from _convert_mlp(tensors, f"{source}mlp.", target, "")
        else:
            yield from _convert_experts(tensors, f"{source}mlp.", target, config)


def _convert_attention(tensors: Tensors, source: str, target: str, config: dict[str, Any]) -> Iterator[Any]:
    if config["q_lora_rank"]:
        yield f"{target}attn_q_a.weight", tensors[f"{source}q_a_proj.weight"]
        yield f"{target}attn_q_a_norm.weight", tensors[f"{source}q_a_layernorm.weight"].float()
        yield f"{target}attn_q_b.weight", tensors[f"{source}q_b_proj.weight"]
    else:
        yield f"{target}attn_q.weight", tensors[f"{source}q_proj.weight"]
    yield f"{target}attn_kv_a_mqa.weight", tensors[f"{source}kv_a_proj_with_mqa.weight"]
    yield f"{target}attn_kv_a_norm.weight", tensors[f"{source}kv_a_layernorm.weight"].float()
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    # [N * (nope + v), rank] -> [N, nope + v, rank]
    both = tensors[f"{source}kv_b_proj.weight"].view(config["num_attention_heads"], nope + value, -1)
    yield f"{target}attn_k_b.weight", both[:, :nope].transpose(1, 2).contiguous()
    yield f"{target}attn_v_b.weight", both[:, nope:].contiguous()
    yield f"{target}attn_output.weight", tensors[f"{source}o_proj.weight"]


def _convert_mlp(tensors: Tensors, source: str, target: str, suffix: str) -> Iterator[Any]:
    for part in ("gate", "up", "down"):
        yield f"{target}ffn_{part}{suffix}.weight", tensors[f"{source}{part}_proj.weight"]


def _convert_experts(tensors: Tensors, source: str, target: str, config: dict[str, Any]) -> Iterator[Any]:
    yield f"{target}ffn_gate_inp.weight", _gate(tensors, f"{source}gate.", config)
    yield f"{target}exp_probs_b.bias", tensors[f"{source}gate.e_score_correction_bias"].float()
    for part in ("gate", "up", "down"):
        names = [f"{source}experts.{e}.{part}_proj.weight" for e in range(config["n_routed_experts"])]
        yield f"{target}ffn_{part}_exps.weight", torch.stack([_expert(tensors, name) for name in names])
    yield from _convert_mlp(tensors, f"{source}shared_experts.", target, "_shexp")


def _expert(tensors: Tensors, name: str) -> torch.Tensor:
    """An expert's matrix in its own type; one in 4 bits as bytes of Q4_0."""
    if f"{name}_packed" not in tensors:
        return tensors[name]
    return q4_0_blocks(tensors[f"{name}_packed"], tensors[f"{name}_scale"])


def _gate(tensors: Tensors, source: str, config: dict[str, Any]) -> torch.Tensor:
    """The router as one matrix [E, D]: `(x Q^T) K^T / sqrt(d) = x (K Q / sqrt(d))^T`."""
    if not config.get("router_key_dim"):
        return tensors[f"{source}weight"].float()
    keys, query = tensors[f"{source}expert_keys"].double(), tensors[f"{source}query_weight"].double()
    return (keys @ query / config["router_key_dim"] ** 0.5).float()


def add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor in its own type; numpy has no bfloat16, so that goes in as raw bytes.

    Args:
        writer: A `gguf.GGUFWriter`.
        name: llama.cpp's name.
        tensor: fp32, fp16 or bf16, or bytes of Q4_0.

    Raises:
        ValueError: Another type.
    """
    from gguf import GGMLQuantizationType

    if tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
    elif tensor.dtype == torch.uint8:
        writer.add_tensor(name, tensor.contiguous().numpy(), raw_dtype=GGMLQuantizationType.Q4_0)
    elif tensor.dtype in (torch.float32, torch.float16):
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        raise ValueError(f"model: {name} is stored as {tensor.dtype}; allowed: fp32, fp16, bf16")
