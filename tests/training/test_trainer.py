"""A run trains, logs, saves and goes on exactly where it stopped; a run that diverges leaves nothing bad behind."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from splatflow.nn import STRATEGIES, Strategy
from splatflow.nn.geometry import is_awake
from splatflow.training import trainer as trainer_module
from splatflow.training.config import EvalConfig, ModelConfig, TrainConfig
from splatflow.training.geometry import GeometryConfig
from splatflow.training.loop import DivergedError, SplatFlowTrainer
from splatflow.training.pretrained import score
from splatflow.training.text import TextError, byte_tokenizer
from splatflow.training.trainer import build_model, hold_out_the_end, train, training_arguments

TEXT = b"".join(b"%d splats are %d, " % (number, number**2) for number in range(130))
HELDOUT = b"".join(b"%d splats are %d, " % (number, number**2) for number in range(200, 230))
MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_splats=5)

# settings with which a strategy acts within a few steps, before and after the checkpoint, where its own do not
SOON = {"split_and_prune": {"every": 3}, "curriculum": {"first": 1, "until": 6}, "min_distance": {"distance": 6.0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> TrainConfig:
    """A run that was not interrupted: 11 steps of 2 x 3 windows, with an epoch's end among them."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_bytes(TEXT)
    (folder / "heldout.txt").write_bytes(HELDOUT)
    config = TrainConfig(
        text=str(folder / "text.txt"),
        heldout=str(folder / "heldout.txt"),
        output_dir=str(folder / "run"),
        model=MODEL,
        seq_len=61,
        batch_size=3,
        accumulation=2,
        steps=11,
        warmup_steps=2,
        log_every=2,
        eval_every=4,
        save_every=4,
        seed=5,
    )
    train(config)
    return config


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(config.output_dir).state_dict()


def log_lines(config: TrainConfig) -> list[dict[str, float]]:
    lines = (Path(config.output_dir) / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"} for line in lines]


def assert_same_run(config: TrainConfig, expected: TrainConfig) -> None:
    ours, theirs = weights(config), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert log_lines(config) == log_lines(expected)


def interrupted(whole: TrainConfig, folder: Path, *steps: int) -> TrainConfig:
    """A run of which `steps` have a checkpoint, and whose log goes on beyond them."""
    folder.mkdir()
    for step in steps:
        shutil.copytree(Path(whole.output_dir) / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(Path(whole.output_dir) / "log.jsonl", folder)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 12, "los')
    return replace(whole, output_dir=str(folder), resume=True)


def test_model_and_tokenizer_load_by_the_auto_classes(whole):
    model = AutoModelForCausalLM.from_pretrained(whole.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(whole.output_dir)
    assert model.config.num_splats == MODEL.num_splats
    assert model.config.vocab_size == len(tokenizer) == 257
    assert tokenizer("Aé")["input_ids"] == [65, 195, 169]


def test_the_log_says_what_was_trained_and_measured(whole):
    lines = log_lines(whole)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_bits_per_byte" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8, 10, 11]
    assert [line["step"] for line in evaluated] == [4, 8, 11]
    assert trained[0]["tokens"] == 2 * 2 * 3 * 61
    assert trained[0]["bits_per_byte"] == pytest.approx(trained[0]["loss"] / math.log(2), rel=0.01)
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert trained[0]["learning_rate"] == pytest.approx(whole.learning_rate / 2)  # before the second step
    assert '"tokens_per_second"' in (Path(whole.output_dir) / "log.jsonl").read_text()


def test_the_last_evaluation_is_that_of_the_saved_model(whole):
    measured = score(EvalConfig(model=whole.output_dir, text=whole.heldout, seq_len=whole.seq_len))
    last = log_lines(whole)[-1]
    assert last["eval_bits_per_byte"] == pytest.approx(measured.bits_per_byte, rel=1e-6)
    assert last["eval_num_bytes"] == measured.num_bytes


@pytest.mark.parametrize("step", [4, 8])  # in the first epoch and in the second
def test_a_resumed_run_equals_one_without_interruption(whole, tmp_path, step):
    config = interrupted(whole, tmp_path / "run", step)
    train(config)
    assert_same_run(config, whole)


def train_collapsed(whole: TrainConfig, folder: Path, *strategies: Strategy) -> TrainConfig:
    """A short run of these strategies, whose splats lie in one place in the first layer: something to do for all."""

    def build_collapsed(*arguments):
        model = build_model(*arguments)
        centers = model.model.layers[0].mixer.centers.data
        centers.copy_(centers[:, :1].expand_as(centers))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "build_model", build_collapsed)
        patch.setattr(trainer_module, "strategies_of", lambda config, seed: list(strategies))
        config = replace(whole, output_dir=str(folder), steps=7, eval_every=0)
        if folder.exists():
            config = replace(config, resume=True)
        train(config)
    return config


@pytest.fixture(scope="module")
def collapsed(whole, tmp_path_factory) -> TrainConfig:
    """Without a strategy."""
    return train_collapsed(whole, tmp_path_factory.mktemp("collapsed") / "run")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_with_a_strategy_equals_one_without_interruption(whole, collapsed, tmp_path, name):
    strategy = STRATEGIES[name](**SOON.get(name, {}))
    expected = train_collapsed(whole, tmp_path / "run", strategy)
    assert any(not weights(expected)[key].equal(value) for key, value in weights(collapsed).items())
    interrupted(expected, tmp_path / "resumed", 4)
    assert_same_run(train_collapsed(whole, tmp_path / "resumed", strategy), expected)


def test_the_settings_of_geometry_reach_the_splats_and_the_log(whole, tmp_path):
    geometry = GeometryConfig(start="kmeans", first_splats=2, all_awake_by=4, min_distance=0.5, overlap=0.1)
    config = replace(whole, output_dir=str(tmp_path), steps=3, geometry=geometry, eval_every=1)
    model = train(config)
    mixer = model.model.layers[0].mixer
    assert is_awake(mixer.splats).sum(-1).tolist() == [4, 4]
    for head in range(2):
        awake = mixer.centers[head, is_awake(mixer.splats)[head]]
        assert torch.pdist(awake).min() >= 0.5
    dead = [line["eval_dead_fraction"] for line in log_lines(config) if "eval_dead_fraction" in line]
    assert dead == pytest.approx([0.6, 0.2, 0.2])
    effective = [line["eval_effective_num_splats"] for line in log_lines(config) if "eval_dead_fraction" in line]
    assert 1 < effective[0] <= 2
    assert 2 < effective[-1] <= 4


def test_an_incomplete_checkpoint_is_passed_over(whole, tmp_path):
    config = interrupted(whole, tmp_path / "run", 4, 8)
    (tmp_path / "run" / "checkpoint-8" / "optimizer.pt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="checkpoint-8 is incomplete.*from .*checkpoint-4"):
        train(config)
    assert_same_run(config, whole)


def test_a_finished_run_is_not_trained_further(whole, tmp_path):
    config = interrupted(whole, tmp_path / "run", 11)
    train(config)
    assert all(weights(config)[name].equal(weight) for name, weight in weights(whole).items())


def test_a_run_is_not_resumed_to_fewer_steps_or_as_another_model(whole, tmp_path):
    config = interrupted(whole, tmp_path / "run", 4)
    with pytest.raises(ValueError, match=r"steps is 3, expected at least the 4 of .*checkpoint-4"):
        train(replace(config, steps=3))
    other = replace(config.model, num_splats=config.model.num_splats + 1)
    with pytest.raises(ValueError, match=r"model\.num_splats is .*as in .*checkpoint-4"):
        train(replace(config, model=other))


def test_checkpoints_of_an_earlier_run_are_not_written_over(whole):
    with pytest.raises(FileExistsError, match=r"checkpoint-11.*resume"):
        train(whole)


def test_a_loss_that_is_not_finite_stops_training_and_saves_nothing(whole, tmp_path):
    config = replace(
        whole, output_dir=str(tmp_path), learning_rate=1e38, warmup_steps=0, schedule="constant", save_every=5
    )
    with pytest.raises(DivergedError, match=r"in step [2-5] the loss is (nan|inf).*learning_rate below 1e\+38"):
        train(config)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(whole, tmp_path, monkeypatch):
    def build_spoilt(*arguments):
        model = build_model(*arguments)
        backward_passes = iter(range(100))
        model.model.norm.weight.register_hook(lambda grad: grad * (math.nan if next(backward_passes) >= 4 else 1))
        return model

    monkeypatch.setattr(trainer_module, "build_model", build_spoilt)
    config = replace(whole, output_dir=str(tmp_path), save_every=1, eval_every=0)
    with pytest.raises(DivergedError, match=r"after step 3 .* not finite"):  # two backward passes a step
        train(config)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"save_every": 0}])
def test_other_settings_train(whole, tmp_path, settings):
    config = replace(whole, output_dir=str(tmp_path), steps=2, **settings)
    train(config)
    expected = log_lines(whole)[0]["loss"]
    assert log_lines(config)[0]["loss"] == pytest.approx(expected, rel=1e-2 if "precision" in settings else 1e-5)
    assert bool(list(tmp_path.glob("checkpoint-*"))) == (config.save_every > 0)


def test_the_softmax_twin_sees_the_same_windows(whole, tmp_path, monkeypatch):
    seen = []
    training_step = SplatFlowTrainer.training_step

    def remember(self, model, inputs, *arguments):
        seen.append(inputs["input_ids"].clone())
        return training_step(self, model, inputs, *arguments)

    monkeypatch.setattr(SplatFlowTrainer, "training_step", remember)
    for mixer in ("splat", "softmax"):
        train(replace(whole, output_dir=str(tmp_path / mixer), steps=2, model=replace(MODEL, mixer=mixer)))
    half = len(seen) // 2
    assert all(ours.equal(theirs) for ours, theirs in zip(seen[:half], seen[half:], strict=True))


def test_weights_decay_in_matrices_and_embeddings_alone():
    model = build_model(
        replace(MODEL, window_size=4, head_norm=True, write_gate=True, value_skip=True), byte_tokenizer()
    )
    decaying = set(SplatFlowTrainer.get_decay_parameter_names(None, model))
    parameters = dict(model.named_parameters())
    assert "model.embed_tokens.weight" in decaying
    assert "model.layers.0.mlp.down_proj.weight" in decaying
    assert all(parameters[name].ndim == 2 for name in decaying & parameters.keys())
    spared = {re.sub(r"model\.layers\.\d\.", "", name) for name in parameters.keys() - decaying}
    assert spared == {
        "mixer_norm.weight", "mlp_norm.weight", "model.norm.weight", "mixer.output.norm.weight",
        "mixer.centers", "mixer.log_scales", "mixer.log_amplitudes", "mixer.prior_log_mass", "mixer.prior_content",
        "mixer.window_log_scale", "mixer.value_skip", "mixer.projections.convolution.weight",
        "mixer.decay_proj.bias", "mixer.write_gate_proj.bias", "mixer.memory_gate_proj.bias",
    }  # fmt: skip


def test_settings_reach_the_trainer(whole):
    arguments = training_arguments(replace(whole, report_to=("tensorboard",), eval_every=0, schedule="linear"))
    assert arguments.report_to == ["tensorboard"]
    assert arguments.eval_steps == whole.steps
    assert arguments.lr_scheduler_type == "linear"
    assert not arguments.logging_nan_inf_filter
    assert training_arguments(whole).report_to == []


@given(
    documents=st.lists(st.text("aé點🫧", min_size=1).map(str.encode), min_size=1, max_size=9),
    fraction=st.floats(0.01, 1),
)
def test_what_is_held_out_is_the_end_and_cuts_no_character(documents, fraction):
    text = hold_out_the_end(documents, fraction)
    everything = b"".join(documents)
    assert b"".join(text.train + text.heldout) == everything
    assert all(part.decode() for part in text.train + text.heldout)
    heldout = sum(map(len, text.heldout))
    assert fraction * len(everything) <= heldout + 1e-6
    assert heldout <= fraction * len(everything) + 4  # at most the rest of a character and a byte of rounding


def test_a_text_too_short_for_a_window_says_which(whole, tmp_path):
    with pytest.raises(TextError, match=r"held-out text: .*tokens; a window of seq_len 1009"):
        train(replace(whole, output_dir=str(tmp_path), seq_len=1009))
