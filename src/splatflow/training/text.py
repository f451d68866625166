"""Text on its way to a model: a source -> documents (bytes) -> tokens (integers) -> windows of equal length.

    documents = read_text("notes/")                  # a file, a folder, or a name such as dataset:wikitext
    tokenizer = load_tokenizer(None)                 # bytes: token id == byte value, 256 ends a document
    windows = TokenWindows(encode(documents, tokenizer), seq_len=1024)

`transformers` and `datasets` are imported where they are used: a wrong path must be reported at once.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BINARY_CHECK_BYTES = 8192
BLOCK_BYTES = 2**16  # of a file, read at once
HELDOUT_FRACTION = 0.05
MIN_HELDOUT_BYTES = 200_000

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
DATASET_NAME = re.compile(r"dataset:(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
NOT_LIBRARY_TEXT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


class TextError(ValueError):
    """A source of text or of tokens that exists and cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Text:
    """Documents to learn from, and documents kept away from learning to measure it."""

    train: list[bytes]
    heldout: list[bytes]


def read_text(source: str) -> list[bytes]:
    """The documents of a source, as bytes.

    | source                          | documents                                                              |
    |---------------------------------|------------------------------------------------------------------------|
    | a file                          | one; `.gz` and `.xz` are unpacked                                      |
    | a folder                        | one for each text file below it, sorted by path; hidden, empty and     |
    |                                 | binary files are left out                                              |
    | `dataset:NAME[:CONFIG][@SPLIT]` | one for each row of `datasets.load_dataset(NAME, CONFIG, split=SPLIT)` |
    |                                 | with a non-empty "text"; SPLIT is `train` unless given                 |

    A file is binary if its first 8,192 bytes, unpacked, hold a NUL byte.

        read_text("dataset:Salesforce/wikitext:wikitext-2-raw-v1@validation")

    Raises `FileNotFoundError` if there is no such source, `TextError` if there is no text in it.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return [b"".join(text_blocks(source))]
    if name := DATASET_NAME.fullmatch(source):
        return _read_dataset(source, name["name"], name["config"], name["split"] or "train")
    raise FileNotFoundError(
        f"no file or folder {source!r}; expected a path that exists or dataset:NAME[:CONFIG][@SPLIT]"
    )


def text_blocks(source: str) -> Iterator[bytes]:
    """The same text piece by piece, a file as the pieces are asked for; raises what `read_text` raises."""
    path = Path(source)
    if path.is_dir() or not path.exists():
        return iter(read_text(source))
    blocks = _unpacked(path)
    first = next(blocks, b"")
    if b"\0" in first[:BINARY_CHECK_BYTES]:
        raise TextError(f"{path} is binary: a NUL byte in its first {BINARY_CHECK_BYTES} bytes; expected UTF-8 text")
    if not first:
        raise TextError(f"{path} is empty: 0 bytes; expected text")
    return chain([first], blocks)


def _read_folder(folder: Path) -> list[bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    documents = [document for path in files if (document := _read_unless_binary(path))]
    if not documents:
        raise TextError(f"folder {folder} holds {len(files)} files and none with text; expected at least one")
    return documents


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_unless_binary(path: Path) -> bytes:
    """The unpacked bytes of a file; none if it is binary, found out before the rest is read."""
    blocks = _unpacked(path)
    first = next(blocks, b"")
    return b"" if b"\0" in first[:BINARY_CHECK_BYTES] else b"".join([first, *blocks])


def _unpacked(path: Path) -> Iterator[bytes]:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TextError(f"{path} cannot be unpacked as {path.suffix}: {error}") from error


def _read_dataset(source: str, name: str, config: str | None, split: str) -> list[bytes]:
    import datasets

    rows = datasets.load_dataset(name, config, split=split)
    if "text" not in rows.column_names:
        raise TextError(f'{source} has no column "text"; its {len(rows.column_names)} columns are {rows.column_names}')
    documents = [text.encode() for text in rows["text"] if text]
    if not documents:
        raise TextError(f"{source} has {len(rows)} rows and none with text; expected at least one")
    return documents


def standard_library_text() -> Text:
    """The Python sources of the running interpreter's standard library, tests left out: text that every Python has.

    Whole files are held out, those with the smallest checksum of their path, until they are 5 % of all bytes and at
    least 200 kB: the same files for everybody who has the same library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    paths = [path for path in paths if NOT_LIBRARY_TEXT.isdisjoint(path.parts)]
    paths.sort(key=lambda path: (zlib.crc32(path.as_posix().encode()), path))
    documents = [document for path in paths if (document := (library / path).read_bytes())]

    enough = max(MIN_HELDOUT_BYTES, HELDOUT_FRACTION * sum(map(len, documents)))
    bytes_so_far = np.cumsum([len(document) for document in documents])
    num_heldout = int(np.searchsorted(bytes_so_far, enough)) + 1
    if num_heldout >= len(documents):
        raise TextError(f"{library} holds {len(documents)} Python sources, too few to hold out {enough:.0f} bytes")
    return Text(train=documents[num_heldout:], heldout=documents[:num_heldout])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte: id == byte value, and 256 for `<|endoftext|>` (bos, eos and pad).

    byte_tokenizer()("Aé")["input_ids"]         # [65, 195, 169]
    byte_tokenizer().decode([65, 195, 169])     # "Aé"
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_vocabulary() -> dict[str, int]:
    """The printable character by which `tokenizers` writes each byte -> the value of that byte.

    A byte that is printable in Latin-1 is written as itself; the others, in order, by the characters that follow 255.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    printable = [character for character in alphabet if ord(character) < 256]
    stand_ins = alphabet[len(printable) :]
    unprintable = sorted(set(range(256)) - set(map(ord, printable)))
    return {character: ord(character) for character in printable} | dict(zip(stand_ins, unprintable, strict=True))


def load_tokenizer(path: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizers` JSON file, of a folder that `AutoTokenizer` reads, or of bytes (`path` None).

    A tokenizer that names no end-of-text token gets `<|endoftext|>`, as a new token if it has none of that name.

    Raises `FileNotFoundError` if there is nothing at `path`, `TextError` if the file describes no tokenizer.
    """
    if path is None:
        return byte_tokenizer()
    if not Path(path).exists():
        raise FileNotFoundError(f"no tokenizer at {path!r}; expected a tokenizers JSON file or a folder")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(path).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        _check_tokenizer_file(Path(path))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, clean_up_tokenization_spaces=False)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    return tokenizer


def _check_tokenizer_file(path: Path) -> None:
    """`tokenizers` reports a wrong file as a bare Exception that does not name it."""
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise TextError(f"{path} is no JSON file: {error}") from error
    if not isinstance(description, dict) or "model" not in description:
        raise TextError(f'{path} describes no tokenizer; expected a JSON object with an entry "model"')


def encode(documents: Iterable[bytes], tokenizer: PreTrainedTokenizerFast) -> Int[np.ndarray, "N"]:
    """The tokens of all documents in a row, each document followed by the end-of-text token; uint16 where ids fit.

    The byte tokenizer takes any bytes; for the others, bytes that are not UTF-8 become the replacement character.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    as_bytes = takes_bytes(tokenizer)
    end = np.array([tokenizer.eos_token_id], dtype)

    def tokens_of(document: bytes) -> np.ndarray:
        if as_bytes:
            return np.frombuffer(document, np.uint8).astype(dtype)
        text = document.decode(errors="replace")
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype)

    pieces = [piece for document in documents for piece in (tokens_of(document), end)]
    return np.concatenate([np.empty(0, dtype), *pieces])


def takes_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether each byte is a token, so that the tokens of the pieces of a text are those of the whole."""
    return tokenizer.get_vocab() == _byte_vocabulary() | {END_OF_TEXT: 256}


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> Int[np.ndarray, "V"]:
    """How many bytes of text each token stands for; 0 for special tokens such as end of text.

    The lengths of the tokens of a text add up to its bytes after the tokenizer's normalisation (lower case, say, or a
    space put before the first word).
    """
    from tokenizers import decoders

    ids = list(range(len(tokenizer)))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        lengths = [len(token) for token in tokens]  # one character stands for one byte
    else:
        # Some tokens lose a leading space or mark at the start of a text, so what counts is what a second one adds.
        once, twice = (
            tokenizer.batch_decode([[token_id] * times for token_id in ids], clean_up_tokenization_spaces=False)
            for times in (1, 2)
        )
        lengths = [len(two.encode()) - len(one.encode()) for one, two in zip(once, twice, strict=True)]
        is_byte = re.compile(r"<0x[0-9A-F]{2}>").fullmatch  # half a character decodes to a mark of three bytes
        lengths = [1 if is_byte(token) else length for token, length in zip(tokens, lengths, strict=True)]
    byte_lengths = np.array(lengths, dtype=np.int64)
    byte_lengths[tokenizer.all_special_ids] = 0
    return byte_lengths


class TokenWindows(Dataset):
    """Tokens cut into windows that do not overlap; what is left over at the end is dropped.

        TokenWindows(np.arange(10, dtype=np.uint16), seq_len=4)[1]["input_ids"]     # tensor([4, 5, 6, 7])

    `labels` are the same tokens: Hugging Face models shift them by one inside.

    Raises `TextError` if there are fewer tokens than one window needs.
    """

    def __init__(self, tokens: Int[np.ndarray, "N"], seq_len: int) -> None:
        if seq_len < 2:
            raise TextError(f"seq_len is {seq_len}; expected at least 2, a token and the one it predicts")
        num_windows = len(tokens) // seq_len
        if num_windows == 0:
            raise TextError(f"the text has {len(tokens)} tokens; a window of seq_len {seq_len} needs {seq_len}")
        self.windows = tokens[: num_windows * seq_len].reshape(num_windows, seq_len)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, "T"]]:
        input_ids = torch.from_numpy(self.windows[index].astype(np.int64))  # [T]
        return {"input_ids": input_ids, "labels": input_ids}
