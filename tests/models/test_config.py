"""The configuration refuses nonsense where it is given, and survives a round trip through JSON."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from splatflow.models import SplatFlowConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size is 30.*num_attention_heads.*4"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size.*'64'"),
        ({"hidden_size": 64.0}, "hidden_size.*64.0"),
        ({"hidden_size": True}, "hidden_size.*True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_splats": 0}, "num_splats is 0"),
        ({"num_splats": None}, "num_splats.*None"),
        ({"window_size": -1}, "window_size is -1"),
        ({"lag": 0}, "lag is 0"),
        ({"lag": 2.5}, "lag.*2.5"),
        ({"transform": "lagged", "causal": False, "decay": None}, "transform is 'lagged'.*causal=False"),
        ({"conv_size": -2}, "conv_size is -2"),
        ({"position_dim": 0}, "position_dim is 0"),
        ({"position_dim": 3, "window_size": 4}, "position_dim is 3.*even"),
        ({"hidden_size": 12, "mixer": "softmax"}, "position_dim is 3.*even"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"initializer_range": -0.1}, "initializer_range is -0.1"),
        ({"mixer": "convolution"}, "mixer is 'convolution'.*'splat'.*'softmax'"),
        ({"routing": "random"}, "routing is 'random'.*'mixture'"),
        ({"decay": "layer"}, "decay is 'layer'.*None.*'head'.*'splat'"),
        ({"decay": 0.5}, "decay.*0.5"),
        ({"write_gate": "yes"}, "write_gate.*'yes'"),
    ],
)
def test_nonsense_names_the_argument_and_what_was_given(arguments, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        SplatFlowConfig(**arguments)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(48, 128), (64, 176), (256, 688)])
def test_intermediate_size_is_eight_thirds_rounded_up_to_sixteen(hidden_size, intermediate_size):
    assert SplatFlowConfig(hidden_size=hidden_size).intermediate_size == intermediate_size


def test_round_trip_through_json(tmp_path):
    config = SplatFlowConfig(hidden_size=36, num_attention_heads=3, num_splats=7, decay=None, window_size=5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SplatFlowConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
