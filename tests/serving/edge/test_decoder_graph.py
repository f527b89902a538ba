import pytest
import torch
from edge_models import ROUTERS, make_other, make_ours

from deepseek_serving.edge.decoder_graph import causal_mask, check_exportable, gathered_bytes_per_token, positions_of


def test_masks_and_positions_of_a_row_with_padding():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    seen = causal_mask(mask, 2) == 0
    assert seen.shape == (2, 1, 2, 4)
    assert seen[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    assert seen[1, 0].tolist() == [[False, False, True, False], [False, False, True, True]]


def test_what_cannot_be_exported_is_named():
    model = make_ours(**ROUTERS["dynamic k"])
    check_exportable(model, 1.0)
    # 4 experts of three matrices of 64 x 32 numbers.
    assert gathered_bytes_per_token(model) == 4 * 4 * 3 * 64 * 32
    with pytest.raises(ValueError, match=r"16 tokens gather .* GiB of experts' weights.*--gather-gib"):
        check_exportable(model, 1e-4)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        check_exportable(model, 1.0)
    mixtral = make_other("mixtral")
    mixtral.config.sliding_window = 16
    with pytest.raises(ValueError, match="within a window"):
        check_exportable(mixtral, 1.0)
    mixtral.config.model_type = "jamba"
    with pytest.raises(ValueError, match="model_type: got 'jamba', expected one of deepseek_moe"):
        check_exportable(mixtral, 1.0)
