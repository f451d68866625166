"""The rivals' operators token by token, straight from their formulas: [B, T, H, X] in, output and last memory out."""

# B batch, T token, H head, P key width, D value width, M slot

import torch
import torch.nn.functional as F


def over_time(length, step, memory):
    """Outputs of `step(t, memory) -> (output, memory)`, side by side, and the last memory."""
    outputs = []
    for t in range(length):
        output, memory = step(t, memory)
        outputs.append(output)
    return torch.stack(outputs, 1), memory


def outer(left, right):
    return left[..., :, None] * right[..., None, :]


def gated_linear_attention(queries, keys, values, log_decay):
    def step(t, memory):
        memory = log_decay[:, t, :, :, None].exp() * memory + outer(keys[:, t], values[:, t])
        return torch.einsum("BHP,BHPD->BHD", queries[:, t], memory), memory

    batch, length, num_heads, width = keys.shape
    return over_time(length, step, keys.new_zeros(batch, num_heads, width, values.shape[-1]))


def normalised(queries, keys, values):
    ones = torch.ones_like(values[..., :1])
    heard, memory = gated_linear_attention(queries, keys, torch.cat([values, ones], -1), torch.zeros_like(keys))
    return heard[..., :-1] / (heard[..., -1:] + 1e-6), memory


def linear_attention(queries, keys, values):
    return normalised(F.elu(queries) + 1, F.elu(keys) + 1, values)


def based(queries, keys, values):
    """The Taylor series by all products of components: twice as many features as the operator keeps."""

    def features(vectors):
        squares = outer(vectors, vectors).flatten(-2) / 2**0.5
        return torch.cat([torch.ones_like(vectors[..., :1]), vectors, squares], -1)

    return normalised(features(queries), features(keys), values)


def gated_delta_rule(queries, keys, values, log_decay, strength):
    def step(t, memory):
        memory = log_decay[:, t, :, None, None].exp() * memory
        said = torch.einsum("BHP,BHPD->BHD", keys[:, t], memory)
        memory = memory + outer(keys[:, t], strength[:, t, :, None] * (values[:, t] - said))
        return torch.einsum("BHP,BHPD->BHD", queries[:, t], memory), memory

    batch, length, num_heads, width = keys.shape
    return over_time(length, step, keys.new_zeros(batch, num_heads, width, values.shape[-1]))


def slot_attention(queries, keys, values, write, log_decay):
    def step(t, memory):
        kept = log_decay[:, t, :, :, None].exp()
        slot_keys, slot_values = (
            kept * part + outer(write[:, t], new[:, t]) for part, new in zip(memory, (keys, values), strict=True)
        )
        shares = torch.einsum("BHP,BHMP->BHM", queries[:, t], slot_keys).softmax(-1)
        return torch.einsum("BHM,BHMD->BHD", shares, slot_values), (slot_keys, slot_values)

    batch, length, num_heads, _ = keys.shape
    empty = [keys.new_zeros(batch, num_heads, write.shape[-1], part.shape[-1]) for part in (keys, values)]
    return over_time(length, step, tuple(empty))


DEFINITIONS = {
    "linear_attention": linear_attention,
    "based": based,
    "gated_linear_attention": gated_linear_attention,
    "gated_delta_rule": gated_delta_rule,
    "slot_attention": slot_attention,
}
