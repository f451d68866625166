"""Presets: what each of them sets, that options come before it, and that its models learn and can do without a part."""

from __future__ import annotations

import pytest
import torch

from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
from splatflow.nn import silence
from splatflow.nn.ablation import MEMORIES
from splatflow.presets import PRESETS, preset
from splatflow.training.config import ModelConfig

SEQ_LEN = 67  # longer than the window
SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 31}
MARKS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

every_preset = pytest.mark.parametrize("name", PRESETS)


def random_tokens():
    return torch.randint(31, (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hybrid", {"mixer": "splat", "window_size": 32, "num_splats": 16, "routing": "mixture", "decay": "head"}),
        ("lattice", {"window_size": 0, "num_splats": 4096, "routing": "lattice", "splat_top_p": 4, "decay": "head"}),
    ],
)
def test_a_preset_is_what_it_says(name, settings):
    for config in (SplatFlowConfig.from_preset(name, hidden_size=48), ModelConfig(**preset(name), hidden_size=48)):
        assert {setting: getattr(config, setting) for setting in settings} == settings
        assert config.hidden_size == 48


@every_preset
def test_options_come_before_the_preset(name):
    config = SplatFlowConfig.from_preset(name, num_splats=49, window_size=6, decay=None)
    assert (config.num_splats, config.window_size, config.decay) == (49, 6, None)
    assert config.routing == PRESETS[name].get("routing", "mixture")
    assert preset(name) == PRESETS[name] != {}


def test_the_table_cannot_be_changed_by_what_is_made_of_it():
    preset("hybrid")["num_splats"] = 3
    assert PRESETS["hybrid"]["num_splats"] == 16


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"preset is 'hybird', expected one of 'hybrid', 'lattice'"):
        SplatFlowConfig.from_preset("hybird")


@every_preset
def test_a_model_of_a_preset_learns_in_a_step(name):
    torch.manual_seed(5)
    model, tokens = SplatFlowForCausalLM(SplatFlowConfig.from_preset(name, **SIZES, **MARKS)), random_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(tokens, labels=tokens).loss < before - 0.01


@torch.no_grad()
def test_each_part_of_the_hybrid_can_be_switched_off():
    torch.manual_seed(5)
    model = SplatFlowForCausalLM(SplatFlowConfig.from_preset("hybrid", **SIZES, **MARKS, conv_size=0)).eval()
    tokens = random_tokens()
    whole = model(tokens).logits
    with silence(model, *MEMORIES):
        deaf = model(tokens).logits
    for memory in MEMORIES:
        with silence(model, memory):
            logits = model(tokens).logits
        assert (logits != whole).any()
        assert (logits != deaf).any()
    with silence(model, "splats"):  # what is far: nothing passes the windows of two layers
        changed = tokens.index_fill(1, torch.tensor([0]), 17)
        assert model(changed).logits[:, 63:].equal(model(tokens).logits[:, 63:])
    assert (model(changed).logits[:, 63:] != whole[:, 63:]).any()
    with silence(model, "window"):  # what is near: a token is heard when it has left the window
        assert model(changed).logits[:, 1:32].equal(deaf[:, 1:32])
