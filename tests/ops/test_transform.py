"""A transform is a matrix for each splat, applied to what it holds before a token receives it."""

import pytest
import torch
from cases import attend, every_backend, every_route, make_arguments, relative_error, skip_unless

T, H, M, D = 11, 3, 7, 5


@every_backend
@every_route
@pytest.mark.parametrize("causal", [True, False])
def test_every_splat_says_its_matrix_times_its_mean(backend, route, causal):
    skip_unless(backend, route)
    arguments = make_arguments(T=T, H=H, M=M, D=D, transform=True, state=True, routing=route["routing"])
    options = {"causal": causal, "backend": backend, **route}
    output, state = attend(arguments, **options)
    listen, say = arguments.pop("listen"), arguments.pop("say")
    num_splats = listen.shape[1]
    matrices = torch.eye(D, dtype=torch.float64) + say[..., :, None] * listen[..., None, :]  # [H, M, D, D]
    expected = torch.zeros_like(output)
    for splat in range(num_splats):  # only this one is read
        one = torch.zeros(H, num_splats, num_splats, dtype=torch.float64)
        one[:, splat, splat] = 1.0
        reads = {**options, "backend": "reference"}
        heard, same = attend({**arguments, "receive_mixing": one}, **reads)
        expected += torch.einsum("hde,bthe->bthd", matrices[:, splat], heard)
    assert relative_error(output, expected) <= 1e-12
    torch.testing.assert_close(state.total, same.total)
