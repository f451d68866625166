"""Memory of forward and backward against the length of the sequence, each case in a process of its own.

python -m benchmarks.training_memory --record benchmarks/results/<file>.json
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
import torch.nn.functional as F
import tyro

from splatflow.diagnostics import peak_memory, write_record
from splatflow.diagnostics.speed import random_splats
from splatflow.ops import splat_attention


@dataclass(frozen=True)
class Options:
    """`hidden_size` is that of the model; the operator works on what one of its layers gives it."""

    seq_lens: tuple[int, ...] = (4096, 16384, 65536, 262144)
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    num_splats: int = 16
    record: str | None = None


def operator(options: Options, seq_len: int, decay: bool) -> Callable[[], None]:
    """Forward and backward of the causal operator, to all of its arguments."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, seq_len, options.num_heads, options.hidden_size // options.num_heads)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    splats = random_splats(options.num_heads, options.num_splats, shape[-1], generator)
    log_decay = F.logsigmoid(4 + torch.randn(shape[:3], generator=generator)) if decay else None
    for leaf in (*tensors, *splats, log_decay):
        if leaf is not None:
            leaf.requires_grad_()

    def forward_and_backward() -> None:
        output, _ = splat_attention(*tensors, splats, log_decay=log_decay)
        output.sum().backward()

    return forward_and_backward


def model(options: Options, seq_len: int, checkpointed: bool) -> Callable[[], None]:
    """Forward and backward of a language model whose heads forget."""
    from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM

    torch.manual_seed(0)
    config = SplatFlowConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_splats=options.num_splats,
    )
    network = SplatFlowForCausalLM(config).train()
    if checkpointed:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(config.vocab_size, (1, seq_len))
    return lambda: network(tokens, labels=tokens).loss.backward()


# name -> what is run, given the options and a length
CASES: dict[str, Callable[[Options, int], Callable[[], None]]] = {
    "operator, no decay": lambda *sizes: operator(*sizes, decay=False),
    "operator": lambda *sizes: operator(*sizes, decay=True),
    "model": lambda *sizes: model(*sizes, checkpointed=False),
    "model, checkpointed": lambda *sizes: model(*sizes, checkpointed=True),
}


def worker(options: Options, name: str, seq_len: int) -> dict[str, float]:
    """One case: what it added to the resident memory at most, its tensors alone, and the seconds of a second run."""
    torch.set_num_threads(1)
    CASES[name](options, 128)()  # loads what is loaded at first use
    forward_and_backward = CASES[name](options, seq_len)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_and_backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    forward_and_backward()
    seconds = time.perf_counter() - start
    return {"resident bytes": (after - before) * 1024, "bytes": peak_memory(forward_and_backward), "seconds": seconds}


def main(options: Options) -> None:
    rows = []
    for name, seq_len in product(CASES, options.seq_lens):
        command = [sys.executable, "-m", "benchmarks.training_memory", "--worker"]
        finished = subprocess.run(
            [*command, json.dumps(asdict(options)), name, str(seq_len)], stdout=subprocess.PIPE, text=True, check=True
        )
        row = {"case": name, "seq_len": seq_len, **json.loads(finished.stdout)}
        rows.append(row)
        print(f"{name}, {seq_len:,} tokens: {row['bytes'] / seq_len:,.0f} bytes a token in tensors, ", end="")
        print(f"{row['resident bytes'] / seq_len:,.0f} resident, {row['seconds'] / seq_len * 1e6:.2f} µs", flush=True)
    if options.record is not None:
        notes = (
            "`bytes`: the most tensor bytes alive at once, above what was alive before; `resident bytes`: by how much "
            "the peak of resident memory grew. fp32, batch 1, forward and backward, on a machine that others used at "
            "the same time, so the seconds, of one run each, are no measurement of speed."
        )
        command = f"OMP_NUM_THREADS=1 python -m benchmarks.training_memory  # {options}"
        write_record(options.record, command=command, rows=rows, seeds=[0], notes=notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(Options(**json.loads(sys.argv[2])), sys.argv[3], int(sys.argv[4]))))
    else:
        main(tyro.cli(Options, description=__doc__))
