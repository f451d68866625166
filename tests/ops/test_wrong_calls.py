"""Wrong calls: each is met by a typed error that names the argument and the numbers, at once."""

import time
from functools import partial

import pytest
import torch

from splatflow.nn import SoftmaxAttention, SplatAttention, silence
from splatflow.ops import Lattice, Splats, SplatState, Transform, splat_attention

B, T, H, M, P, D = 2, 7, 3, 5, 4, 11

call = {
    "send_positions": torch.zeros(B, T, H, P),
    "receive_positions": torch.zeros(B, T, H, P),
    "values": torch.zeros(B, T, H, D),
    "splats": Splats(torch.zeros(H, M, P), torch.zeros(H, M), torch.zeros(H, M)),
}
one_row = {name: part if name == "splats" else part[:1] for name, part in call.items()}
centers, log_scales, log_amplitudes, _ = call["splats"]
lattice = Lattice(torch.zeros(H, 2, 3, P // 2), torch.zeros(H, 2, 3), torch.zeros(H, 2, 3))
state = SplatState(torch.zeros(B, H, M), torch.zeros(B, H, M, D))


def wrong(given=call, **changes):
    return partial(splat_attention, **{**given, **changes})


def layer(**changes):
    return partial(SplatAttention, **{"hidden_size": 12, "num_heads": 2, "num_splats": M, **changes})


def twin(**changes):
    return partial(SoftmaxAttention, **{"hidden_size": 12, "num_heads": 2, **changes})


def masked(mixer):
    module = mixer()
    return partial(module, torch.zeros(B, T, 12), attention_mask=torch.ones(B, T + 1, dtype=torch.bool))


def resumed(mixer, other, batch=B, dtype=torch.float32):
    """`mixer` called with the state that `other` leaves."""
    return partial(mixer(), torch.zeros(B, T, 12), state=other()(torch.zeros(batch, 1, 12, dtype=dtype))[1])


def silenced(mixer, memory):
    return lambda: silence(mixer(), memory).__enter__()


# what is wrong: (the call, the error, what its message says)
WRONG_CALLS = {
    "values with too few axes": (wrong(values=torch.zeros(T, H, D)), ValueError, ["values", "[7, 3, 11]", "4 axes"]),
    "values of integers": (wrong(values=torch.zeros(B, T, H, D).long()), TypeError, ["values", "torch.int64"]),
    "values a list": (wrong(values=[1.0]), TypeError, ["values", "list"]),
    "values for other heads": (wrong(values=torch.zeros(B, T, H + 1, D)), ValueError, ["centers", "[3, 5", "[4, 5"]),
    "positions a list": (wrong(send_positions=[1.0]), TypeError, ["send_positions", "list"]),
    "positions too wide": (wrong(send_positions=torch.zeros(B, T, H, 9)), ValueError, ["send_positions", "9]", "4]"]),
    "positions of another batch": (wrong(send_positions=torch.zeros(3, T, H, P)), ValueError, ["send_pos", "[3", "[2"]),
    "too few positions": (wrong(send_positions=torch.zeros(B, 6, H, P)), ValueError, ["send_positions", "6", "7"]),
    "targets too wide": (wrong(receive_positions=torch.zeros(B, T, H, 9)), ValueError, ["receive_positions", "9", "4"]),
    "fp64 positions": (wrong(send_positions=call["send_positions"].double()), TypeError, ["send_pos", "64", "32"]),
    "fp64 values": (wrong(values=call["values"].double()), TypeError, ["send_positions", "float32", "float64"]),
    "positions elsewhere": (wrong(send_positions=call["values"].to("meta")), ValueError, ["send_pos", "meta", "cpu"]),
    "splats elsewhere": (
        wrong(splats=call["splats"]._replace(centers=centers.to("meta"))),
        ValueError,
        ["centers", "meta", "cpu"],
    ),
    "no splats": (
        wrong(splats=Splats(centers[:, :0], log_scales[:, :0], log_amplitudes[:, :0])),
        ValueError,
        ["centers", "0 splats", "at least 1"],
    ),
    "splats a tensor": (wrong(splats=centers), TypeError, ["splats", "Tensor", "Splats("]),
    "scales for fewer splats": (
        wrong(splats=call["splats"]._replace(log_scales=log_scales[:, 1:])),
        ValueError,
        ["log_scales", "[3, 4]", "[3, 5]"],
    ),
    "amplitudes for fewer heads": (
        wrong(splats=call["splats"]._replace(log_amplitudes=log_amplitudes[1:])),
        ValueError,
        ["log_amplitudes", "[2, 5]", "[3, 5]"],
    ),
    "scales a number": (wrong(splats=call["splats"]._replace(log_scales=0.0)), TypeError, ["log_scales", "float"]),
    "a lattice for a mixture": (wrong(splats=lattice), TypeError, ["splats", "Lattice", "Splats(centers", "'mixture'"]),
    "no lattice": (wrong(routing="lattice"), TypeError, ["splats is a Splats", "Lattice(centers", "'lattice'"]),
    "a lattice of odd halves": (
        wrong(splats=lattice._replace(log_scales=torch.zeros(H, 2, 4)), routing="lattice"),
        ValueError,
        ["log_scales", "[3, 2, 4]", "[3, 2, 3]"],
    ),
    "a lattice in a narrow space": (
        wrong(splats=lattice._replace(centers=torch.zeros(H, 2, 3, 1)), routing="lattice"),
        ValueError,
        ["send_positions", "4]", "2]"],
    ),
    "no reach": (wrong(routing="compact"), ValueError, ["log_reaches is None", "'compact'"]),
    "a reach without use": (
        wrong(splats=call["splats"]._replace(log_reaches=log_scales)),
        ValueError,
        ["log_reaches is given", "'mixture'"],
    ),
    "more than all splats": (wrong(top_p=6), ValueError, ["top_p is 6", "5"]),
    "none of the splats": (wrong(top_p=0), ValueError, ["top_p is 0", "1"]),
    "a lattice of three parts": (
        wrong(routing="lattice", top_p=2, splats=Lattice(torch.zeros(H, 3, 2, P // 2), *(torch.zeros(H, 3, 2),) * 2)),
        ValueError,
        ["splats.centers", "3"],
    ),
    "half a splat": (wrong(top_p=0.5), TypeError, ["top_p is 0.5", "integer"]),
    "the nearest of those in reach": (
        wrong(splats=call["splats"]._replace(log_reaches=log_scales), routing="compact", top_p=2),
        ValueError,
        ["top_p is 2", "'compact'"],
    ),
    "groups without a search": (wrong(routing="grouped"), ValueError, ["top_p is None", "'grouped'"]),
    "a sparse form of all splats": (wrong(backend="sparse"), ValueError, ["'sparse'", "top_p is None"]),
    "a sparse form that forgets": (
        wrong(backend="sparse", top_p=2, log_decay=torch.zeros(B, T, H, M)),
        ValueError,
        ["'sparse'", "log_decay"],
    ),
    "a bias for other splats": (wrong(send_bias=torch.zeros(B, T, H, 9)), ValueError, ["send_bias", "9]", "5]"]),
    "a bias for each lattice splat": (
        wrong(splats=lattice, routing="lattice", receive_bias=torch.zeros(B, T, H, 9)),
        ValueError,
        ["receive_bias", "9]", "6]"],
    ),
    "a sparse form that reads all": (
        wrong(backend="sparse", top_p=2, receive_mixing=torch.zeros(H, M, M)),
        ValueError,
        ["'sparse'", "receive_mixing"],
    ),
    "a mixing of other splats": (
        wrong(receive_mixing=torch.zeros(H, M, 4)),
        ValueError,
        ["receive_mixing", "[3, 5, 4]", "[3, 5, 5]"],
    ),
    "a mixing of integers": (wrong(receive_mixing=torch.zeros(H, M, M).int()), TypeError, ["receive_mixing", "int32"]),
    "a transform of another width": (
        wrong(transform=Transform(torch.zeros(H, M, D), torch.zeros(H, M, 9))),
        ValueError,
        ["transform.say", "[3, 5, 9]", "[3, 5, 11]"],
    ),
    "a transform a tensor": (wrong(transform=centers), TypeError, ["transform", "Tensor", "Transform(listen, say)"]),
    "causal cross attention": (
        wrong(receive_positions=torch.zeros(B, 6, H, P)),
        ValueError,
        ["receive_positions", "6", "7", "causal"],
    ),
    "unknown routing": (wrong(routing="nearest"), ValueError, ["routing", "'nearest'", "mixture"]),
    "unknown backend": (wrong(backend="fast"), ValueError, ["backend", "'fast'", "chunked"]),
    "a decay that grows": (wrong(log_decay=torch.full((B, T, H), 0.5)), ValueError, ["log_decay", "0.5", "0"]),
    "a decay without order": (
        wrong(log_decay=torch.zeros(B, T, H), causal=False),
        ValueError,
        ["log_decay", "causal=False"],
    ),
    "a decay per token": (wrong(log_decay=torch.zeros(B, T)), ValueError, ["log_decay", "[2, 7]", "[2, 7, 3]"]),
    "a decay of integers": (wrong(log_decay=torch.zeros(B, T, H).int()), TypeError, ["log_decay", "torch.int32"]),
    "a decay elsewhere": (wrong(log_decay=torch.zeros(B, T, H, device="meta")), ValueError, ["log_decay", "meta"]),
    "a gate above 1": (wrong(write_gate=torch.full((B, T, H), 1.5)), ValueError, ["write_gate", "1.5", "1"]),
    "a gate below 0": (wrong(write_gate=torch.full((B, T, H, M), -0.5)), ValueError, ["write_gate", "-0.5", "0"]),
    "a gate for other splats": (wrong(write_gate=torch.zeros(B, T, H, 9)), ValueError, ["write_gate", "9]", "5]"]),
    "a gate a number": (wrong(write_gate=0.5), TypeError, ["write_gate", "float"]),
    "a mask of numbers": (wrong(padding_mask=torch.ones(B, T)), TypeError, ["padding_mask", "float32", "bool"]),
    "a mask too long": (wrong(padding_mask=torch.ones(B, 8).bool()), ValueError, ["padding_mask", "[2, 8]", "[2, 7]"]),
    "a mask with documents": (
        wrong(one_row, padding_mask=torch.ones(1, T).bool(), cu_seqlens=torch.tensor([0, T])),
        ValueError,
        ["padding_mask", "cu_seqlens"],
    ),
    "documents in two rows": (wrong(cu_seqlens=torch.tensor([0, T])), ValueError, ["cu_seqlens", "batch of 2", "1"]),
    "documents that end early": (wrong(one_row, cu_seqlens=torch.tensor([0, 5])), ValueError, ["[0, 5]", "0 to 7"]),
    "documents that start late": (wrong(one_row, cu_seqlens=torch.tensor([1, 7])), ValueError, ["[1, 7]", "0 to 7"]),
    "documents that go back": (wrong(one_row, cu_seqlens=torch.tensor([0, 5, 3, 7])), ValueError, ["cu_seq", "5, 3"]),
    "documents as a list": (wrong(one_row, cu_seqlens=[0, 7]), TypeError, ["cu_seqlens", "list", "int32"]),
    "documents as floats": (wrong(one_row, cu_seqlens=torch.tensor([0.0, 7.0])), TypeError, ["cu_seqlens", "float32"]),
    "one state for two documents": (
        wrong(one_row, cu_seqlens=torch.tensor([0, 3, T]), state=SplatState(state.mass[:1], state.total[:1])),
        ValueError,
        ["state.mass", "[1, 3, 5]", "[2, 3, 5]"],
    ),
    "a state of another width": (
        wrong(state=state._replace(total=torch.zeros(B, H, M, 9))),
        ValueError,
        ["state.total", "9]", "11]"],
    ),
    "a state in bf16": (
        wrong(state=state._replace(mass=state.mass.bfloat16())),
        TypeError,
        ["state.mass", "bfloat16", "float32"],
    ),
    "a state a tensor": (wrong(state=state.total), TypeError, ["state", "Tensor", "SplatState"]),
    "a state elsewhere": (wrong(state=state._replace(mass=state.mass.to("meta"))), ValueError, ["state.mass", "meta"]),
    "heads that do not divide": (layer(num_heads=5), ValueError, ["hidden_size is 12", "num_heads", "5"]),
    "no heads": (layer(num_heads=0), ValueError, ["num_heads is 0"]),
    "senders that cannot be shared": (
        layer(num_key_value_heads=3),
        ValueError,
        ["num_key_value_heads is 3", "a divisor of the 2 heads"],
    ),
    "a table of biases of other heads": (
        lambda: partial(layer(num_key_value_heads=1)(), torch.zeros(B, T, 12))(token_bias=torch.zeros(B, T, 2, M)),
        ValueError,
        ["token_bias has shape", f"expected [{B}, {T}, 1, {M}]"],
    ),
    "a table of biases that is none": (
        lambda: partial(layer()(), torch.zeros(B, T, 12))(token_bias="mine"),
        TypeError,
        ["token_bias is str"],
    ),
    "half a sender": (layer(num_key_value_heads=0.5), TypeError, ["num_key_value_heads is 0.5", "integer"]),
    "tied positions of other heads": (
        layer(num_key_value_heads=1, tied_positions=True),
        ValueError,
        ["num_key_value_heads is 1", "expected 2 with tied_positions"],
    ),
    "a layer without splats": (layer(num_splats=0), ValueError, ["num_splats", "0", "at least 1"]),
    "a layer of unknown routing": (layer(routing="nearest"), ValueError, ["routing", "'nearest'", "mixture"]),
    "a layer with half a mask": (layer(causal="past"), TypeError, ["causal is 'past'", "True or False"]),
    "a state from longer chunks": (
        lambda: partial(layer(transform="lagged", lag=2)(), torch.zeros(B, T, 12))(
            state=layer(transform="lagged", lag=9)()(torch.zeros(B, 5, 12))[1]
        ),
        ValueError,
        ["num_tokens is [5, 5]", "lag, 2"],
    ),
    "a layer of unknown decay": (layer(decay="token"), ValueError, ["decay", "'token'", "splat"]),
    "a negative window": (layer(window_size=-1), ValueError, ["window_size", "-1"]),
    "a negative convolution": (layer(conv_size=-2), ValueError, ["conv_size", "-2"]),
    "positions of width 0": (layer(position_dim=0), ValueError, ["position_dim", "0", "at least 1"]),
    "an odd width with a window": (layer(window_size=4, position_dim=3), ValueError, ["position_dim", "3", "even"]),
    "a window without order": (layer(causal=False, window_size=4), ValueError, ["causal=False", "window_size is 4"]),
    "a layer's decay without order": (
        layer(causal=False, decay="head"),
        ValueError,
        ["causal=False", "'head'"],
    ),
    "a mask for other tokens": (masked(layer()), ValueError, ["attention_mask", "[2, 8]", "[2, 7]"]),
    "the twin's mask for other tokens": (masked(twin()), ValueError, ["attention_mask", "[2, 8]", "[2, 7]"]),
    "the twin's heads": (twin(num_heads=5), ValueError, ["hidden_size is 12", "num_heads", "5"]),
    "the twin's odd width": (twin(num_heads=4), ValueError, ["position_dim", "3", "even"]),
    "the twin's negative window": (twin(window_size=-1), ValueError, ["window_size", "-1"]),
    "tokens of another width": (partial(layer()(), torch.zeros(B, T, 13)), ValueError, ["hidden_states", "13", "12"]),
    "the twin's tokens of another width": (partial(twin()(), torch.zeros(T, 12)), ValueError, ["[7, 12]", "12]"]),
    "a state of too few splats": (
        resumed(layer(), layer(num_splats=3)),
        ValueError,
        ["state.splats.mass", "[2, 2, 3]", "[2, 2, 5]"],
    ),
    "a state of a longer window": (
        resumed(layer(window_size=4), layer(window_size=6)),
        ValueError,
        ["state.window.send_positions", "[2, 6, 2, 6]", "[2, 4, 2, 6]"],
    ),
    "a state with a window": (resumed(layer(), layer(window_size=6)), TypeError, ["state.window", "None"]),
    "a state without a window": (resumed(layer(window_size=6), layer()), TypeError, ["state.window", "WindowState"]),
    "a state without a decay": (
        resumed(layer(window_size=6, decay="head"), layer(window_size=6)),
        ValueError,
        ["state.window.log_decay", "None", "[2, 6, 2]"],
    ),
    "a state of a longer convolution": (
        resumed(layer(conv_size=4), layer(conv_size=3)),
        ValueError,
        ["state.convolution", "[2, 2, 36]", "[2, 3, 36]"],
    ),
    "a state of the twin": (resumed(layer(), twin()), TypeError, ["state", "SoftmaxAttentionState", "SplatAtt"]),
    "the twin's state of a longer window": (
        resumed(twin(window_size=4), twin(window_size=6)),
        ValueError,
        ["state.keys", "[2, 6, 2, 6]", "[2, 4, 2, 6]"],
    ),
    "a state in fp64": (
        resumed(layer(conv_size=4), lambda: layer(conv_size=4)().double(), dtype=torch.float64),
        TypeError,
        ["state.splats.mass", "float64", "float32"],
    ),
    "hops on a lattice": (
        layer(num_splats=9, routing="lattice", hops=1),
        ValueError,
        ["hops is 1", "'lattice'"],
    ),
    "an mlp of every past": (layer(transform="mlp"), ValueError, ["transform is 'mlp'", "causal"]),
    "an unknown transform": (layer(transform="cubic"), ValueError, ["transform is 'cubic'", "'linear', 'mlp'"]),
    "a lag of no token": (layer(transform="lagged", lag=0), ValueError, ["lag is 0", "at least 1"]),
    "a lag of 2.5 tokens": (layer(transform="lagged", lag=2.5), TypeError, ["lag is 2.5", "integer"]),
    "a state without a lagged one": (
        resumed(layer(transform="lagged"), layer()),
        TypeError,
        ["state.lagged", "NoneType", "LaggedState"],
    ),
    "a state with a lagged one": (resumed(layer(), layer(transform="lagged")), TypeError, ["state.lagged", "None"]),
    "half a hop": (layer(hops=0.5), TypeError, ["hops is 0.5", "integer"]),
    "super-splats without a hop": (layer(num_super_splats=3), ValueError, ["num_super_splats is 3", "hops=0"]),
    "no super-splats": (layer(hops=1, num_super_splats=0), ValueError, ["num_super_splats is 0", "at least 1"]),
    "a window of 2.5 tokens": (layer(window_size=2.5), TypeError, ["window_size is 2.5", "integer"]),
    "a state of another batch": (
        resumed(layer(), layer(), batch=3),
        ValueError,
        ["state.splats.mass", "[3, 2, 5]", "[2, 2, 5]"],
    ),
    "a silence of nothing known": (silenced(layer(), "memory"), ValueError, ["memory", "'memory'", "splats"]),
    "a silence of no window": (silenced(layer(), "window"), ValueError, ["'window'", "SplatAttention has none"]),
    "a silence of no splats": (silenced(twin(), "splats"), ValueError, ["'splats'", "SoftmaxAttention has none"]),
}


def test_there_are_many_wrong_calls():
    assert len(WRONG_CALLS) >= 40


def test_the_call_itself_is_right():
    wrong()()
    wrong(one_row, cu_seqlens=torch.tensor([0, 3, T]))()
    wrong(state=state)()


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(name):
    function, error, words = WRONG_CALLS[name]
    start = time.perf_counter()
    with pytest.raises((ValueError, TypeError)) as raised:
        function()
    assert time.perf_counter() - start < 1.0
    assert raised.type is error
    assert all(word in str(raised.value) for word in words), raised.value
