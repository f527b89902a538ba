"""A weight map names files beside it."""

import json

import pytest

from modeling_deepseek.checkpoint_check import read_weight_map


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/../../x", "..", "sub/x.safetensors", "..\\x"])
def test_a_shard_elsewhere_is_refused_in_one_line(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors", "v": shard}}))
    with pytest.raises(ValueError, match="expected a file beside it") as caught:
        read_weight_map(index)
    assert "\n" not in str(caught.value)
