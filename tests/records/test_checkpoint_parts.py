"""Parts of weights become an ordinary checkpoint, or one line says what is missing."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from deepseek_records.checkpoint_parts import is_in_parts, join_parts
from deepseek_records.loading import load_model
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DeepseekForCausalLM(DeepseekConfig.from_preset("debug", num_nextn_predict_layers=1)).eval()


@pytest.fixture
def parts(model, tmp_path):
    folder = tmp_path / "parts"
    model.config.save_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
    return folder


@pytest.mark.parametrize("most_gib", [4.0, 2e-4])
def test_joined_parts_are_what_the_model_saves(most_gib, model, parts, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert is_in_parts(parts) and not is_in_parts(tmp_path / "saved") and not is_in_parts(tmp_path / "nothing")
    num_bytes = join_parts(parts, tmp_path / "whole", most_gib=most_gib)
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert (len(files) == 1) == (most_gib == 4)
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert num_bytes == sum(tensor.nbytes for tensor in expected.values())
    if len(files) > 1:
        index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys() and index["metadata"]["total_size"] == num_bytes
    tokens = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(load_model(tmp_path / "whole")(tokens).logits, load_model(tmp_path / "saved")(tokens).logits)
    assert not (tmp_path / "whole.partial").exists()


def test_a_missing_or_damaged_part_leaves_no_output(parts, tmp_path):
    (path,) = parts.glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"^model: .* holds a part that is damaged or cut short"):
        join_parts(parts, tmp_path / "whole")
    path.write_bytes(content)
    some = dict(list(load_file(path).items())[:-1])
    path.unlink()
    save_file(some, path)
    with pytest.raises(
        ValueError, match=r"holds 0 of the \d+ values of .*, expected all; a process's part is missing"
    ):
        join_parts(parts, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_parts_are_refused_where_a_whole_model_is_asked_for(parts, tmp_path):
    with pytest.raises(
        ValueError, match=r"in parts by several processes; put them together first: deepseek-moe export"
    ):
        load_model(parts)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(FileExistsError, match="expected an empty or absent folder"):
        join_parts(parts, tmp_path / "taken")
