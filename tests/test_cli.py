"""The command line does what the functions do, and tells a user's mistake in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import splatflow
from splatflow.cli import SUBCOMMANDS, main

SOURCE = Path(__file__).parents[1] / "src"
TEXT = " ".join(f"{number} splats are {number**2}," for number in range(400))
TOML = """
text = "{folder}/text.txt"
output_dir = "{folder}/run"
seq_len = 31
batch_size = 5
steps = 900
log_every = 2
save_every = 0
[model]
hidden_size = 32
num_layers = 2
num_heads = 2
num_splats = 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text, and in `run` a model that was trained on it by `splatflow train`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    (folder / "train.toml").write_text(TOML.format(folder=folder))
    assert main(["train", "--config", f"{folder}/train.toml", "--steps", "3", "--model.num-splats", "7"]) == 0
    return folder


def test_flags_override_the_file(folder):
    assert len((folder / "run" / "log.jsonl").read_text().splitlines()) == 3  # steps 2 and 3, and the evaluation
    assert '"num_splats": 7' in (folder / "run" / "config.json").read_text()


def test_a_preset_comes_after_the_file_and_before_the_flags(folder, capsys):
    flags = ["--preset", "hybrid", "--model.num-splats", "11", "--output-dir", f"{folder}/hybrid", "--steps", "3"]
    assert main(["train", "--config", f"{folder}/train.toml", "--seq-len", "61", *flags]) == 0
    config = json.loads((folder / "hybrid" / "config.json").read_text())
    # of the file, whose num_splats is 5; of the preset; of the flags
    assert (config["hidden_size"], config["window_size"], config["num_splats"]) == (32, 32, 11)
    capsys.readouterr()
    lines = set()
    for without in ([], ["--without", "splats"], ["--without", "window"]):
        assert main(["eval", f"{folder}/hybrid", f"{folder}/text.txt", "--seq-len", "61", *without]) == 0
        lines.add(capsys.readouterr().out)
    assert len(lines) == 3


def test_the_file_may_leave_out_what_the_flags_give(tmp_path, capsys):
    (tmp_path / "train.toml").write_text("steps = 3")
    assert main(["train", "--config", f"{tmp_path}/train.toml", "--text", f"{tmp_path}/none.txt"]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_eval_prints_bits_per_byte_and_what_the_splats_are_worth(folder, capsys):
    lines = []
    for flags in ([], ["--without", "splats"]):
        assert main(["eval", f"{folder}/run", f"{folder}/text.txt", "--seq-len", "31", *flags]) == 0
        lines.append(capsys.readouterr().out)
    number_of_bytes = f"{30 * (len(TEXT) // 31):,} bytes"
    for line in lines:
        assert "bits per byte (95 % interval" in line
        assert number_of_bytes in line
    assert lines[0] != lines[1]


def test_eval_without_a_memory_that_the_model_lacks_says_so(folder, capsys):
    assert main(["eval", f"{folder}/run", f"{folder}/text.txt", "--seq-len", "31", "--without", "window"]) == 2
    assert "memory 'window' cannot be silenced" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(folder, capsys):
    before = (folder / "run" / "log.jsonl").read_text()
    assert main(["train", "--config", f"{folder}/train.toml", "--steps", "1"]) == 2
    assert "run holds model.safetensors of an earlier run" in capsys.readouterr().err
    assert main(["train", "--config", f"{folder}/train.toml", "--resume"]) == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert (folder / "run" / "log.jsonl").read_text() == before


def test_generate_continues_the_prompt(folder, capsys):
    def written(*flags: str) -> str:
        assert main(["generate", f"{folder}/run", "--max-new-tokens", "11", *flags]) == 0
        return capsys.readouterr().out

    (folder / "prompt.txt").write_text("7 splats")
    greedy = written("--prompt", "7 splats", "--temperature", "0")
    assert greedy.startswith("7 splats")
    assert greedy == written("--prompt-file", f"{folder}/prompt.txt", "--temperature", "0", "--seed", "3")
    sampled = written("--seed", "3", "--top-k", "50")
    assert sampled == written("--seed", "3", "--top-k", "50") != written("--seed", "4", "--top-k", "50")


def test_a_long_prompt_is_read_in_pieces_with_a_bar_and_only_its_end_is_printed(folder, capsys):
    (folder / "long.txt").write_text(TEXT)

    def written(*flags: str) -> tuple[str, str]:
        prompt = ("--prompt-file", f"{folder}/long.txt", "--max-new-tokens", "11", "--temperature", "0")
        assert main(["generate", f"{folder}/run", *prompt, *flags]) == 0
        return capsys.readouterr()

    whole, no_bar = written("--prefill-size", f"{len(TEXT) + 1}")
    in_pieces, bar = written("--prefill-size", "997")
    assert in_pieces == whole
    assert whole.startswith(TEXT[-500:])
    assert "reading" not in no_bar
    assert f"{len(TEXT) / 1000:.2f}k/{len(TEXT) / 1000:.2f}k" in bar


def test_a_model_that_is_not_ours_gets_its_prompt_whole(folder, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    from splatflow.training.text import byte_tokenizer

    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3)).eval()
    model.save_pretrained(folder / "other")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "other")
    flags = ["--prompt", "7 splats", "--max-new-tokens", "11", "--temperature", "0", "--prefill-size", "3"]
    assert main(["generate", f"{folder}/other", *flags]) == 0
    tokens = torch.tensor([[256, *b"7 splats"]])
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=11, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def test_generate_writes_what_the_model_finds_likeliest(folder, capsys):
    from splatflow.training.pretrained import load_pretrained

    assert main(["generate", f"{folder}/run", "--prompt", "7 sp", "--max-new-tokens", "1", "--temperature", "0"]) == 0
    pretrained = load_pretrained(f"{folder}/run")
    with torch.no_grad():
        logits = pretrained.model(torch.tensor([[256, *b"7 sp"]])).logits
    likeliest = pretrained.tokenizer.decode(logits[0, -1].argmax(), skip_special_tokens=True)
    assert capsys.readouterr().out == f"7 sp{likeliest}\n"


def test_divergence_is_one_line(folder, tmp_path, capsys):
    flags = ["--output-dir", f"{tmp_path}/run", "--learning-rate", "1e38", "--warmup-steps", "0"]
    assert main(["train", "--config", f"{folder}/train.toml", *flags]) == 2
    assert "splatflow: error: in step" in capsys.readouterr().err


WRONG_CALLS = {
    "missing text": (["train", "--text", "{folder}/none.txt"], "none.txt"),
    "binary text": (["train", "--text", "{folder}/binary.txt"], "binary.txt is binary"),
    "empty text": (["train", "--text", "{folder}/empty.txt"], "empty.txt is empty: 0 bytes"),
    "missing held-out text": (["train", "--text", "{folder}/a.txt", "--heldout", "{folder}/none.txt"], "none.txt"),
    "missing settings": (["train", "--config", "{folder}/none.toml"], "none.toml"),
    "wrong settings": (["train", "--config", "{folder}/wrong.toml"], "wrong.toml: steps is 0, expected at least 1"),
    "unknown preset": (
        ["train", "--text", "{folder}/a.txt", "--preset", "hybird"],
        "expected one of 'hybrid', 'lattice'",
    ),
    "preset and missing text": (["train", "--text", "{folder}/none.txt", "--preset", "hybrid"], "none.txt"),
    "eval without a model": (["eval", "{folder}/none", "{folder}/a.txt"], "no model in '{folder}/none'"),
    "eval without a text": (["eval", "{folder}/model", "{folder}/none.txt"], "none.txt"),
    "eval on a binary text": (["eval", "{folder}/model", "{folder}/binary.txt"], "binary.txt is binary"),
    "generate without a model": (["generate", "{folder}/none"], "no model in '{folder}/none'"),
    "generate from an empty file": (
        ["generate", "{folder}/model", "--prompt-file", "{folder}/empty.txt"],
        "empty.txt is empty",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_is_one_line_within_a_second_and_without_transformers(
    tmp_path, capsys, monkeypatch, arguments, message
):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "wrong.toml").write_text("steps = 0")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    import splatflow.training.pretrained
    import splatflow.training.trainer  # noqa: F401  # light, but torch is not

    for heavy in ("transformers", "splatflow.models", "splatflow.training.loop"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it fails
    began = time.perf_counter()
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert time.perf_counter() - began < 1
    error = capsys.readouterr().err
    assert error.startswith("splatflow: error: ")
    assert error.count("\n") == 1
    assert message.format(folder=tmp_path) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SUBCOMMAND"),
        (["trian"], "trian"),
        (["train"], "--text"),
        (["train", "--preset", "hybrid"], "--text"),
        (["train", "--text", "a", "--steps", "0"], "steps is 0"),
        (["train", "--text", "a", "--steps", "many"], "many"),
        (["train", "--text", "a", "--precision", "fp8"], "fp8"),
        (["train", "--text", "a", "--stpes", "3"], "--stpes"),
        (["eval", "model"], "TEXT"),
        (["eval", "model", "a", "--without", "mlp"], "mlp"),
        (["generate", "model", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "model", "--prefill-size", "0"], "prefill_size is 0"),
    ],
)
def test_wrong_flags_end_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "eval", "generate"])
def test_every_setting_has_its_help(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert SUBCOMMANDS[name].__doc__[:30] in printed
    assert "Folder" in printed


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(arguments: list[str]) -> int:
        raise TypeError("a mistake of ours")

    monkeypatch.setitem(SUBCOMMANDS, "train", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        main(["train"])


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"splatflow {splatflow.__version__}\n"


def test_python_m_splatflow_lists_the_subcommands():
    finished = subprocess.run(
        [sys.executable, "-m", "splatflow", "--help"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in finished.stdout for name in SUBCOMMANDS)
