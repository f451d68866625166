"""The operator by itself: three splats on a line, six tokens, and how much each token hears of each other one."""

import torch

from splatflow import Splats, splat_attention

centers = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1)  # [heads, splats, width of the space]
splats = Splats(centers, log_scales=torch.zeros(1, 3), log_amplitudes=torch.zeros(1, 3))
places = torch.tensor([-2.0, -2.0, 2.0, 2.0, -2.0, 0.0])
positions = places.view(1, 6, 1, 1)  # [batch, tokens, heads, width of the space]

# With one-hot values, what a token receives is its row of the token-token matrix, which is never built otherwise.
one_hot = torch.eye(6).view(1, 6, 1, 6)
output, state = splat_attention(positions, positions, one_hot, splats)
matrix = output[0, :, 0]  # [target, source]

print(" place   hears token 0 ... 5" + " " * 24 + "sum")
for place, row in zip(places.tolist(), matrix, strict=True):
    print(f"{place:>6.1f}  " + "".join(f"{weight:7.3f}" for weight in row.tolist()) + f"{row.sum().item():9.3f}")
print("the splats were sent", [round(mass, 3) for mass in state.mass.flatten().tolist()])
assert torch.allclose(matrix.sum(-1), torch.ones(6))
