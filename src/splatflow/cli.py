"""The command line: parse, call, print. A new subcommand is a function here and a row of `SUBCOMMANDS`.

Each imports what it calls when it is called, so that `splatflow --help` loads torch and nothing heavier.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from splatflow import __version__

Config = TypeVar("Config")

# mistakes that a user can make: a value, a path, a learning rate
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def demo(arguments: list[str]) -> int:
    """Train a splat model and its softmax twin on text that every Python has, and compare them."""
    from splatflow.training.demo import DemoConfig
    from splatflow.training.demo import demo as run

    return run(_parse("demo", DemoConfig, arguments))


def train(arguments: list[str]) -> int:
    """Train a language model on text; --config FILE.toml, then --preset NAME give settings, which flags override."""
    import tyro

    from splatflow.presets import preset
    from splatflow.training.config import TrainConfig
    from splatflow.training.run_file import load_toml
    from splatflow.training.trainer import train as run

    parser = argparse.ArgumentParser(prog="splatflow train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--preset")
    given, flags = parser.parse_known_args(arguments)
    default = None
    if given.config is not None:
        default = load_toml(given.config, TrainConfig, text=tyro.MISSING)  # the flags may name the text
    if given.preset is not None:
        default = default or TrainConfig(text=tyro.MISSING)
        default = replace(default, model=replace(default.model, **preset(given.preset)))
    config = _parse("train", TrainConfig, flags, default)
    run(config)
    print(f"the model is in {config.output_dir}")
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure a trained model on a text, in bits per byte."""
    from splatflow.training.config import EvalConfig
    from splatflow.training.pretrained import score

    measured = score(_parse("eval", EvalConfig, arguments))
    print(
        f"{measured.bits_per_byte:.4f} bits per byte "
        f"(95 % interval {measured.low:.4f} to {measured.high:.4f}, {measured.num_bytes:,} bytes)"
    )
    return 0


def generate(arguments: list[str]) -> int:
    """Let a trained model continue a text."""
    from splatflow.training.config import GenerateConfig
    from splatflow.training.pretrained import generate as run

    run(_parse("generate", GenerateConfig, arguments))  # prints while it generates
    return 0


def bench(arguments: list[str]) -> int:
    """Measure the speed of splat attention beside softmax attention."""
    from splatflow.diagnostics.speed import BenchConfig
    from splatflow.diagnostics.speed import bench as run

    return run(_parse("bench", BenchConfig, arguments))


# name -> what it does with the arguments that follow; the first line of its docstring is its help
SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
}


def _parse(name: str, config_class: type[Config], arguments: list[str], default: Config | None = None) -> Config:
    """A configuration made of flags; prints help or a mistake and exits, as `argparse` does."""
    import tyro

    return tyro.cli(
        config_class,
        prog=f"splatflow {name}",
        description=SUBCOMMANDS[name].__doc__,
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; a mistake of the user's is one line on stderr, and 2."""
    parser = argparse.ArgumentParser(prog="splatflow", description="Splat attention: train, measure, generate.")
    parser.add_argument("--version", action="version", version=f"splatflow {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name, subcommand in SUBCOMMANDS.items():
        subparsers.add_parser(name, help=subcommand.__doc__, add_help=False, allow_abbrev=False)
    chosen, rest = parser.parse_known_args(arguments)
    try:
        return SUBCOMMANDS[chosen.subcommand](rest)
    except USER_ERRORS as error:
        print(f"splatflow: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
