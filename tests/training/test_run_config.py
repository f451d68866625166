"""Settings: nonsense is refused where it is given, and a TOML file says the same as Python."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from splatflow.models import SplatFlowConfig
from splatflow.nn.strategy import (
    Curriculum,
    KMeansStart,
    MinimumDistance,
    OverlapLoss,
    Repulsion,
    SplitAndPrune,
)
from splatflow.training.config import EvalConfig, GenerateConfig, ModelConfig, Schedule, TrainConfig
from splatflow.training.geometry import GeometryConfig, strategies_of
from splatflow.training.run_file import load_toml

TOML = """
text = "notes/"
learning_rate = 1
report_to = ["tensorboard"]
[model]
num_splats = 7
decay = "None"
"""


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (TrainConfig, {"text": ""}, "text is ''"),
        (TrainConfig, {"output_dir": ""}, "output_dir is ''"),
        (TrainConfig, {"seq_len": 1}, "seq_len is 1, expected at least 2"),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0, expected at least 1"),
        (TrainConfig, {"accumulation": -3}, "accumulation is -3"),
        (TrainConfig, {"steps": 0}, "steps is 0, expected at least 1"),
        (ModelConfig, {"lag": 0}, "lag is 0, expected at least 1"),
        (TrainConfig, {"log_every": 0}, "log_every is 0"),
        (TrainConfig, {"eval_every": -1}, "eval_every is -1, expected at least 0"),
        (TrainConfig, {"save_every": -1}, "save_every is -1"),
        (TrainConfig, {"warmup_steps": -1}, "warmup_steps is -1"),
        (TrainConfig, {"weight_decay": float("nan")}, "weight_decay is nan"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (TrainConfig, {"learning_rate": float("inf")}, "learning_rate is inf"),
        (TrainConfig, {"schedule": "cosinus"}, "schedule is 'cosinus'.*'cosine'"),
        (TrainConfig, {"precision": "fp8"}, "precision is 'fp8'.*'fp32', 'bf16'"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
        (ModelConfig, {"hidden_size": 30}, "hidden_size is 30, expected a multiple of num_heads, which is 4"),
        (ModelConfig, {"num_layers": 0}, "num_layers is 0"),
        (ModelConfig, {"num_heads": 0}, "num_heads is 0"),
        (ModelConfig, {"num_splats": 0}, "num_splats is 0"),
        (ModelConfig, {"window_size": -1}, "window_size is -1"),
        (ModelConfig, {"conv_size": -1}, "conv_size is -1"),
        (ModelConfig, {"position_bias": -1}, "position_bias is -1"),
        (ModelConfig, {"mixer": "softmax", "position_bias": 7}, "position_bias is 7, expected 0 for .*'softmax'"),
        (ModelConfig, {"mixer": "softmax", "token_bias": True}, "token_bias is True, expected False for .*'softmax'"),
        (ModelConfig, {"intermediate_size": 0}, "intermediate_size is 0"),
        (ModelConfig, {"mixer": "mlp"}, "mixer is 'mlp'.*'splat', 'softmax'"),
        (ModelConfig, {"routing": "random"}, "routing is 'random'.*'mixture'"),
        (ModelConfig, {"decay": "layer"}, "decay is 'layer'.*None, 'head', 'splat'"),
        (
            TrainConfig,
            {"model": ModelConfig(mixer="softmax"), "geometry": GeometryConfig(overlap=1.0)},
            "expected 'splat'",
        ),
        (
            TrainConfig,
            {"model": ModelConfig(routing="lattice"), "geometry": GeometryConfig(repulsion=1.0)},
            "geometry is set with model.routing 'lattice'",
        ),
        (
            TrainConfig,
            {"model": ModelConfig(token_bias=True), "geometry": GeometryConfig(split_every=9)},
            "geometry.split_every or first_splats is set with a bias",
        ),
        (
            TrainConfig,
            {"model": ModelConfig(position_bias=7), "geometry": GeometryConfig(first_splats=2, all_awake_by=9)},
            "geometry.split_every or first_splats is set with a bias",
        ),
        (
            TrainConfig,
            {"model": ModelConfig(num_splats=3), "geometry": GeometryConfig(first_splats=4, all_awake_by=9)},
            "geometry.first_splats is 4, expected at most model.num_splats, 3",
        ),
        (GeometryConfig, {"start": "middle"}, "start is 'middle'.*'random', 'kmeans'"),
        (GeometryConfig, {"overlap": -1.0}, "overlap is -1.0"),
        (GeometryConfig, {"repulsion": float("inf")}, "repulsion is inf"),
        (GeometryConfig, {"min_distance": -0.5}, "min_distance is -0.5"),
        (GeometryConfig, {"split_every": -1}, "split_every is -1"),
        (GeometryConfig, {"first_splats": 2}, "first_splats is 2 and all_awake_by 0, expected both or neither"),
        (GeometryConfig, {"all_awake_by": 2}, "first_splats is 0 and all_awake_by 2"),
        (EvalConfig, {"model": "", "text": "a"}, "model is ''"),
        (EvalConfig, {"model": "a", "text": "a", "without": ("mlp",)}, "without is 'mlp'.*'splats', 'window'"),
        (EvalConfig, {"model": "a", "text": "a", "seq_len": 1}, "seq_len is 1"),
        (GenerateConfig, {"model": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        (GenerateConfig, {"model": "a", "temperature": -0.5}, "temperature is -0.5"),
        (GenerateConfig, {"model": "a", "top_k": -1}, "top_k is -1"),
        (GenerateConfig, {"model": "a", "prompt": "b", "prompt_file": "c"}, "prompt is 'b' and prompt_file 'c'"),
    ],
)
def test_nonsense_is_refused_by_name_and_number(config_class, settings, message):
    if config_class is TrainConfig:
        settings = {"text": "notes/", **settings}
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"start": "kmeans"}, [KMeansStart(seed=11)]),
        ({"first_splats": 2, "all_awake_by": 5}, [Curriculum(first=2, until=5, seed=11)]),
        ({"overlap": 0.5}, [OverlapLoss(0.5)]),
        ({"split_every": 7, "repulsion": 0.25}, [SplitAndPrune(every=7, seed=11), Repulsion(0.25)]),
        ({"min_distance": 2.0, "repulsion": 1.0}, [Repulsion(1.0), MinimumDistance(2.0)]),
    ],
)
def test_each_setting_of_geometry_is_a_strategy(settings, expected):
    assert strategies_of(GeometryConfig(**settings), seed=11) == expected


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().num_splats = 3


def test_the_default_model_is_that_of_the_library():
    library = SplatFlowConfig()
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    shared = [part.name for part in fields(ModelConfig) if part.name != "intermediate_size"]
    ours = {name: getattr(ModelConfig(), name) for name in shared}
    assert ours == {name: getattr(library, names.get(name, name)) for name in shared}


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_transformers_knows_every_schedule_and_asks_for_no_more(schedule):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=5)


def test_toml_says_the_same_as_python(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    expected = TrainConfig(
        text="notes/",
        learning_rate=1.0,
        report_to=("tensorboard",),
        model=ModelConfig(num_splats=7, decay=None),
    )
    config = load_toml(path, TrainConfig, text="other", seed=0)
    assert config == expected
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("steps 3", "run.toml: .*line 1"),
        ("steps = 3", "run.toml: text is missing, expected str"),
        ("text = 'a'\nstep = 3", "run.toml: step is unknown, expected one of .*steps"),
        ("text = 'a'\nsteps = '3'", "run.toml: steps is '3', expected int"),
        ("text = 'a'\nsteps = 3.0", "run.toml: steps is 3.0, expected int"),
        ("text = 'a'\nsteps = true", "run.toml: steps is True, expected int"),
        ("text = 'a'\nsteps = 0", "run.toml: steps is 0, expected at least 1"),
        ("text = 'a'\nsteps = 'None'", "run.toml: steps is 'None', expected int"),
        ("text = 'a'\nresume = 1", "run.toml: resume is 1, expected bool"),
        ("text = 'a'\nheldout = 3", r"run.toml: heldout is 3, expected str \| None"),
        ("text = 'a'\nprecision = 'fp8'", "run.toml: precision is 'fp8', expected .*'bf16'"),
        ("text = 'a'\nreport_to = 'wandb'", "run.toml: report_to is 'wandb', expected tuple"),
        ("text = 'a'\nreport_to = ['wandb', 3]", r"run.toml: report_to\[1\] is 3, expected str"),
        ("text = 'a'\nmodel = 3", "run.toml: model is 3, expected .*ModelConfig"),
        ("text = 'a'\n[model]\nsplats = 3", "run.toml: model.splats is unknown, expected one of .*num_splats"),
        ("text = 'a'\n[model]\nnum_splats = 0", "run.toml: model.num_splats is 0, expected at least 1"),
        ("text = 'a'\n[model]\nnum_splats = '3'", "run.toml: model.num_splats is '3', expected int"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path, toml, message):
    path = tmp_path / "run.toml"
    path.write_text(toml)
    with pytest.raises(ValueError, match=message):
        load_toml(path, TrainConfig)


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        load_toml(tmp_path / "none.toml", TrainConfig)
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"binary\.toml"):
        load_toml(path, TrainConfig)


def test_the_example_is_complete_but_for_the_text(request):
    config = load_toml(request.config.rootpath / "examples" / "train.toml", TrainConfig, text="notes/")
    assert config.model.hidden_size == 128
