"""SplatAttention as a layer: one pass over a text, the same text in pieces, and the memory that is carried along."""

import torch
from torch.utils._pytree import tree_leaves

from splatflow import SplatAttention
from splatflow.nn.splat_attention import SplatAttentionState

torch.manual_seed(0)
layer = SplatAttention(hidden_size=64, num_heads=4, num_splats=16, window_size=8, decay="head", conv_size=4)
hidden_states = torch.randn(2, 300, 64)  # [batch, tokens, hidden]


def num_bytes(state: SplatAttentionState) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(state) if isinstance(tensor, torch.Tensor))


with torch.no_grad():
    at_once, _ = layer(hidden_states)

    outputs, state = [], None  # None is the beginning of a text
    for piece in hidden_states.split((200, 1, 1, 98), dim=1):  # a prompt, two single tokens, and the rest
        output, state = layer(piece, state=state)
        outputs.append(output)
        print(f"{piece.shape[1]:>3} tokens more, {num_bytes(state):,} bytes remembered")

difference = (torch.cat(outputs, 1) - at_once).abs().max().item()
print(f"in pieces and at once differ by at most {difference:.0e}")
