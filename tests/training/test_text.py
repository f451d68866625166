"""Text arrives unchanged as documents, tokens and windows, and what cannot be read is refused by name and at once."""

from __future__ import annotations

import gzip
import json
import lzma
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from splatflow.training.text import (
    TextError,
    TokenWindows,
    byte_tokenizer,
    encode,
    load_tokenizer,
    read_text,
    standard_library_text,
    token_byte_lengths,
)

BYTES = byte_tokenizer()
SAMPLE = "Gaußsche Splats 🫧 sind naïve points,\n\tseen   from afar: 點. The points are splats.\n"


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Merged bytes, as in GPT-2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=283, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Merged characters with bytes for those it does not know, spaces written as marks, as in Llama 2."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Splatsore", "at", "▁p"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
            merges=[("a", "t"), ("▁", "p")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


# A source becomes documents.


@pytest.mark.parametrize(("name", "opener"), [("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.xz", lzma.open)])
def test_a_file_is_one_document(tmp_path: Path, name: str, opener) -> None:
    with opener(tmp_path / name, "wb") as stream:
        stream.write(SAMPLE.encode())
    assert read_text(str(tmp_path / name)) == [SAMPLE.encode()]


def test_a_folder_is_its_text_files_sorted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "c.txt").write_bytes(b"third")
    (tmp_path / "b" / "2.md").write_bytes(b"second")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"first", mtime=0))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / ".git" / "HEAD").write_bytes(b"hidden")
    assert read_text(str(tmp_path)) == [b"first", b"second", b"third"]


@pytest.fixture
def jsonl_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "notes"
    folder.mkdir()
    for split, texts in {"train": ["naïve", "", "second"], "test": ["held out"]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_a_dataset_is_its_rows_with_text(jsonl_folder: Path) -> None:
    assert read_text(f"dataset:{jsonl_folder}") == ["naïve".encode(), b"second"]
    assert read_text(f"dataset:{jsonl_folder}:default@test") == [b"held out"]


def test_a_dataset_without_a_text_column_is_refused(jsonl_folder: Path) -> None:
    for file in jsonl_folder.iterdir():
        file.write_text('{"title": "a", "year": 1}\n')
    with pytest.raises(TextError, match=r'no column "text"; its 2 columns are'):
        read_text(f"dataset:{jsonl_folder}")


def test_a_dataset_of_empty_rows_is_refused(jsonl_folder: Path) -> None:
    (jsonl_folder / "train.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(TextError, match="3 rows and none with text"):
        read_text(f"dataset:{jsonl_folder}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty: 0 bytes"),
        # without the time of day, which would give the tests other names in each worker
        ("empty.gz", gzip.compress(b"", mtime=0), "empty.gz is empty: 0 bytes"),
        ("weights.bin", b"PK\0\1", "weights.bin is binary: a NUL byte in its first 8192 bytes"),
        ("packed.xz", lzma.compress(b"\0"), "packed.xz is binary"),
        ("broken.xz", b"not packed", "broken.xz cannot be unpacked as .xz"),
        ("broken.gz", b"not packed", "broken.gz cannot be unpacked as .gz"),
        ("torn.gz", gzip.compress(b"text" * 99, mtime=0)[:20], "torn.gz cannot be unpacked as .gz"),
        ("folder/weights.bin", b"\0", "folder holds 1 files and none with text"),
    ],
)
def test_sources_without_text_are_refused_at_once(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if "/" in name else path
    start = time.perf_counter()
    with pytest.raises(TextError, match=message):
        read_text(str(source))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("source", ["no/such/file.txt", "dataset:", "dataset:name@"])
def test_missing_sources_are_refused(source: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"no file or folder '{source}'; expected a path that exists or dataset"
    ):
        read_text(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="holds 0 files"):
        read_text(str(tmp_path))


def test_the_standard_library_is_split_by_file_in_the_same_way_every_time() -> None:
    text = standard_library_text()
    num_train, num_heldout = (sum(map(len, documents)) for documents in (text.train, text.heldout))
    assert num_heldout >= max(200_000, 0.05 * (num_train + num_heldout))
    assert num_train > 5 * num_heldout
    assert text == standard_library_text()
    assert any(b"topics = {" in document for document in text.train + text.heldout), "pydoc_data is missing"


# Documents become tokens.


@given(st.text())
def test_byte_tokens_are_the_bytes_and_decode_to_the_text(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert tokenizer.get_vocab() == BYTES.get_vocab()
        assert tokenizer(SAMPLE)["input_ids"] == list(SAMPLE.encode())
        assert tokenizer.decode([*SAMPLE.encode(), 256], skip_special_tokens=True) == SAMPLE
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 256
        assert len(tokenizer) == 257


def test_encode_ends_each_document_and_takes_any_bytes() -> None:
    tokens = encode([b"ab", b"\xff\x00"], BYTES)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [97, 98, 256, 255, 0, 256]
    assert encode([], BYTES).shape == (0,)


@pytest.mark.parametrize("saved_as", ["tokenizer.json", "folder"])
def test_encode_with_a_loaded_tokenizer(tmp_path: Path, saved_as: str) -> None:
    original = byte_level_tokenizer()
    path = tmp_path / saved_as
    if saved_as == "folder":
        original.save_pretrained(path)
    else:
        original.backend_tokenizer.save(str(path))
    tokenizer = load_tokenizer(str(path))
    tokens = encode([SAMPLE.encode(), b"points"], tokenizer)
    first, second = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert second == len(tokens) - 1
    assert len(tokens) < len(SAMPLE.encode()), "nothing was merged"
    assert tokenizer.decode(tokens[:first]) == SAMPLE
    assert tokenizer.decode(tokens[first + 1 : second]) == "points"


def test_a_tokenizer_without_an_end_gets_one(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "words.json"))
    assert load_tokenizer(str(tmp_path / "words.json")).eos_token_id == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"word list", "is no JSON file"), (b"\xff\0", "is no JSON file"), (b'{"vocab": {}}', "describes no tokenizer")],
)
def test_a_wrong_tokenizer_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TextError, match=f"tokenizer.json {message}"):
        load_tokenizer(str(path))


def test_a_missing_tokenizer_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at 'no/such\.json'"):
        load_tokenizer("no/such.json")


@pytest.mark.parametrize(
    ("tokenizer", "normalised"),
    [(BYTES, SAMPLE), (byte_level_tokenizer(), SAMPLE), (byte_fallback_tokenizer(), " " + SAMPLE)],
    ids=["bytes", "byte level", "byte fallback"],
)
def test_byte_lengths_of_tokens_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, normalised: str) -> None:
    lengths = token_byte_lengths(tokenizer)
    tokens = encode([SAMPLE.encode()], tokenizer)
    assert lengths.shape == (len(tokenizer),)
    assert lengths[tokenizer.eos_token_id] == 0
    assert lengths[tokens].sum() == len(normalised.encode())


# Tokens become windows.


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    windows = TokenWindows(np.arange(17, dtype=np.uint16), seq_len=5)
    assert len(windows) == 3
    rows = torch.stack([window["input_ids"] for window in windows])
    assert rows.dtype == torch.int64
    assert torch.equal(rows.flatten(), torch.arange(15))
    assert all(torch.equal(window["labels"], window["input_ids"]) for window in windows)


def test_windows_need_enough_tokens() -> None:
    tokens = np.arange(17, dtype=np.uint16)
    assert len(TokenWindows(tokens, seq_len=17)) == 1
    with pytest.raises(TextError, match="has 17 tokens; a window of seq_len 18 needs 18"):
        TokenWindows(tokens, seq_len=18)
    with pytest.raises(TextError, match="seq_len is 1; expected at least 2"):
        TokenWindows(tokens, seq_len=1)
