"""A hop is tokens to splats, splats to super-splats and back, and splats to tokens, and nothing else."""

import torch
from cases import attend, every_backend, make_arguments, relative_error, skip_unless

from splatflow.ops import Splats, mixing_of_hop
from splatflow.ops.routing import route

H, M, K, P = 3, 7, 4, 5


def random_splats(num_splats, seed):
    generator = torch.Generator().manual_seed(seed)
    centers, scales, amplitudes = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((H, num_splats, P), (H, num_splats), (H, num_splats))
    )
    return Splats(centers, 0.3 * scales, amplitudes)


def hop(seed):
    splats, super_splats = random_splats(M, 0), random_splats(K, seed)
    strength = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    return splats, super_splats, strength


def test_a_hop_keeps_means_means():
    mixing = mixing_of_hop(*hop(1))
    torch.testing.assert_close(mixing.sum(-1), torch.ones(H, M, dtype=torch.float64))
    assert mixing.min() >= 0
    assert torch.equal(mixing[0], torch.eye(M, dtype=torch.float64))
    assert (mixing[2] - torch.eye(M)).abs().amax(-1).min() > 1e-3


@every_backend
def test_two_hops_are_taken_one_after_the_other(backend):
    """Step by step: contents of splats, means at the super-splats, what splats hear of those, what tokens hear."""
    skip_unless(backend, {"routing": "mixture"}, mixing=True)
    hops = [hop(1), hop(2)]
    splats = hops[0][0]
    arguments = make_arguments(B=2, T=11, H=H, M=M, P=P, D=2)
    arguments |= dict(zip(("centers", "log_scales", "log_amplitudes"), splats[:3], strict=True))
    first, second = (mixing_of_hop(*parts) for parts in hops)
    output, _ = attend({**arguments, "receive_mixing": second @ first}, causal=False, backend=backend)

    send, receive = (route(arguments[f"{side}_positions"], splats, "mixture") for side in ("send", "receive"))
    contents = torch.einsum("bthm,bthd->bhmd", send, arguments["values"]) / send.sum(1)[..., None]
    for _, super_splats, strength in hops:
        heard = torch.zeros_like(contents)
        for head in range(H):
            shares = route(
                splats.centers[head][None, :, None], Splats(*(part[head][None] for part in super_splats[:3])), "mixture"
            )
            shares = shares[0, :, 0]  # [M, K]
            weights = shares * splats.log_amplitudes[head].exp()[:, None]
            means = torch.stack(
                [(weights[:, k, None] * contents[:, head]).sum(1) / weights[:, k].sum() for k in range(K)], 1
            )
            heard[:, head] = shares @ means
        contents = (1 - strength)[:, None, None] * contents + strength[:, None, None] * heard
    expected = torch.einsum("bthm,bhmd->bthd", receive, contents)
    assert relative_error(output, expected) <= 1e-12


def test_the_halves_of_a_splat_are_heard_as_the_whole_and_sleepers_not_at_all():
    splats, super_splats, strength = hop(1)
    centers, scales, amplitudes = (part.clone() for part in splats[:3])
    amplitudes[:, 6] = -1e30
    whole = mixing_of_hop(Splats(centers, scales, amplitudes), super_splats, strength)
    assert not whole[:, :6, 6].any()
    amplitudes[:, 6] = amplitudes[:, 2] = amplitudes[:, 2] - torch.tensor(2.0).log()
    centers[:, 6] = centers[:, 2]
    halves = mixing_of_hop(Splats(centers, scales, amplitudes), super_splats, strength)
    together = halves[:, :6, :6].clone()
    together[:, :, 2] += halves[:, :6, 6]
    torch.testing.assert_close(together, whole[:, :6, :6])
