"""Names of single experts in every family of transformers, against what `save_pretrained` writes."""

import pytest
from safetensors import safe_open
from tiny_families import build_tiny, find_experts_classes

from deepseek_serving.checkpoint_names import read_names


@pytest.mark.slow
def test_every_experts_class_is_named_as_it_is_saved_or_refused(tmp_path, capsys):
    named, refused = [], []
    for module, name in find_experts_classes():
        model = build_tiny(module, name)
        try:
            names = read_names(model)
        except ValueError as error:
            assert str(error).startswith("base: got ") and "\n" not in str(error)
            refused.append(name)
            continue
        model.save_pretrained(tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        for (block, expert, part), key in names.experts.items():
            if part == "down_proj":
                assert saved[f"{key}.weight"] == names.shapes[f"{block}.down_proj"][1:], (name, expert)
            else:
                _, height, width = names.shapes[f"{block}.gate_up_proj"]
                assert saved[f"{key}.weight"] == (height // 2, width), (name, expert)
        named.append(name)
    with capsys.disabled():
        print(f"experts classes named one by one: {len(named)}, refused: {len(refused)} ({', '.join(refused)})")
    assert len(named) >= 43 and len(named) + len(refused) >= 65
