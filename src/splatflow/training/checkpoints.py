"""Which checkpoint to go on from: a run that was killed while it wrote one leaves a folder that cannot be loaded."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):  # reads the header and compares it with the size of the file
            return True
    except SafetensorError:
        return False


def _is_whole_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


# the files of a checkpoint -> whether one is whole
PARTS: dict[str, Callable[[Path], bool]] = {
    "model*.safetensors": _is_whole_safetensors,
    "optimizer.pt": zipfile.is_zipfile,  # torch.save writes zip files, whose directory comes last
    "scheduler.pt": zipfile.is_zipfile,
    "rng_state*.pth": zipfile.is_zipfile,
    "trainer_state.json": _is_whole_json,
}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, complete or not."""
    found = [path for path in folder.glob("*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The steps that were taken before a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def reason_incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded, such as "optimizer.pt is missing"; None if it can."""
    for pattern, is_whole in PARTS.items():
        files = sorted(checkpoint.glob(pattern))
        if not files:
            return f"{pattern} is missing"
        for file in files:
            if not is_whole(file):
                return f"{file.name} is cut short"
    return None


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that can be loaded; None if there is none. Warns of each newer one that it passes over."""
    passed_over = []
    for checkpoint in checkpoints(folder):
        reason = reason_incomplete(checkpoint)
        if reason is None:
            break
        passed_over.append(f"{checkpoint} is incomplete ({reason})")
    else:
        checkpoint = None
    if passed_over:
        start = f"from {checkpoint}" if checkpoint else "from the beginning"
        warnings.warn(f"{'; '.join(passed_over)}; going on {start}", stacklevel=2)
    return checkpoint
