"""What is asked of settings, in layers, configurations and tasks alike: each error names one, and what was given."""

from __future__ import annotations

import math
from collections.abc import Collection


def require_at_least(least: float, **settings: float) -> None:
    """Raises ValueError for a setting below `least`, or one that is infinite or nan.

    >>> require_at_least(1, num_heads=2, num_splats=0)
    Traceback (most recent call last):
    ValueError: num_splats is 0, expected at least 1
    """
    for name, given in settings.items():
        if not least <= given < math.inf:
            raise ValueError(f"{name} is {given}, expected at least {least}")


def require_integers(least: int, **settings: int) -> None:
    """Raises TypeError for a setting that is no integer, ValueError for one below `least`.

    >>> require_integers(1, num_splats=True)
    Traceback (most recent call last):
    TypeError: num_splats is True, expected an integer
    """
    for name, given in settings.items():
        if not isinstance(given, int) or isinstance(given, bool):
            raise TypeError(f"{name} is {given!r}, expected an integer")
    require_at_least(least, **settings)


def require_one_of(known: Collection[str | None], **settings: str | None) -> None:
    """Raises ValueError for a setting that is not among `known`."""
    for name, given in settings.items():
        if given not in known:
            raise ValueError(f"{name} is {given!r}, expected one of {', '.join(map(repr, known))}")


def require_no_order(**settings: int | str | None) -> None:
    """Raises ValueError for a setting that is not off (0 or None), in a layer or model without a causal mask.

    >>> require_no_order(window_size=0, decay="head")
    Traceback (most recent call last):
    ValueError: decay is 'head', expected None with causal=False: it needs an order of tokens
    """
    for name, given in settings.items():
        if given:
            off = 0 if isinstance(given, int) else None
            raise ValueError(f"{name} is {given!r}, expected {off} with causal=False: it needs an order of tokens")


def require_no_routing(mixer: str, **biases: int) -> None:
    """Raises ValueError for a table of biases that is not off (0 or False), with a mixer that has no splats.

    >>> require_no_routing("softmax", token_bias=False, position_bias=7)
    Traceback (most recent call last):
    ValueError: position_bias is 7, expected 0 for the mixer 'softmax', which routes nothing
    """
    for name, given in biases.items():
        if given:
            off = type(given)(0)
            raise ValueError(f"{name} is {given}, expected {off} for the mixer {mixer!r}, which routes nothing")


def require_heads(hidden_size: int, **num_heads: int) -> None:
    """Raises ValueError unless the hidden size can be shared out among the heads."""
    require_integers(1, hidden_size=hidden_size, **num_heads)
    for name, heads in num_heads.items():
        if hidden_size % heads:
            raise ValueError(f"hidden_size is {hidden_size}, expected a multiple of {name}, which is {heads}")


def share_of_heads(num_heads: int, num_key_value_heads: int | None, *, tied: bool = False) -> int:
    """How many heads send, of so many that receive: as many if not given, or if both are tied.

    Raises:
        TypeError, ValueError: no number of heads that the others can be shared out among.

    >>> share_of_heads(6, None), share_of_heads(6, 2)
    (6, 2)
    """
    if num_key_value_heads is None:
        return num_heads
    require_integers(1, num_key_value_heads=num_key_value_heads)
    if num_heads % num_key_value_heads:
        raise ValueError(f"num_key_value_heads is {num_key_value_heads}, expected a divisor of the {num_heads} heads")
    if tied and num_key_value_heads != num_heads:
        raise ValueError(f"num_key_value_heads is {num_key_value_heads}, expected {num_heads} with tied_positions")
    return num_key_value_heads


def require_even_positions(position_dim: int) -> None:
    """Raises ValueError if rotary positions, which turn pairs of numbers, cannot be given to positions so wide."""
    if position_dim % 2:
        raise ValueError(f"position_dim is {position_dim}, expected an even width, which rotary positions need")
