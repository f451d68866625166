"""k-means finds clusters, layers start where their tokens lie, and a softmax attention is a set of splats."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
from splatflow.nn import SoftmaxAttention, SplatAttention, initialise_from_attention, initialise_from_batch, kmeans
from splatflow.nn.starts import SPREAD, splats_of_keys
from splatflow.nn.usage import run_watched, splat_layers
from splatflow.ops.routing import log_affinity, route

B, T, C, H, M = 3, 23, 24, 2, 5
# heads of a layer, and how many of them send
SENDERS = {"each sends": (H, None), "senders are shared": (3 * H, H)}


def inertia(points, centers):
    """Sum of squared distances to the nearest center, by head."""
    return torch.cdist(points, centers).amin(-1).square().sum(-1)


def best_inertia(points, num_clusters):
    """The least of all ways to part N points of one head among clusters."""
    best = torch.inf
    for labels in itertools.product(range(num_clusters), repeat=points.shape[0]):
        chosen = torch.tensor(labels)
        parts = [points[chosen == cluster] for cluster in range(num_clusters)]
        best = min(best, sum((part - part.mean(0)).square().sum().item() for part in parts if len(part)))
    return best


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), num_clusters=st.sampled_from((2, 3, 5)))
def test_every_iteration_of_kmeans_brings_centers_nearer(seed, num_clusters):
    points = torch.randn(H, 41, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sums = [inertia(points, kmeans(points, num_clusters, seed=seed, max_iterations=n)) for n in range(9)]
    assert all((later <= earlier + 1e-12).all() for earlier, later in itertools.pairwise(sums))
    ended = kmeans(points, num_clusters, seed=seed, max_iterations=1000)
    nearest = torch.cdist(points, ended).argmin(-1)
    for head in range(H):  # a fixed point: every center is the mean of what is nearest to it
        means = [points[head, nearest[head] == cluster].mean(0) for cluster in range(num_clusters)]
        torch.testing.assert_close(ended[head], torch.stack(means))


def test_the_best_of_a_few_starts_is_the_best_of_all_partitions():
    points = torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = min(inertia(points, kmeans(points, 3, seed=seed)).item() for seed in range(20))
    assert found == pytest.approx(best_inertia(points[0], 3), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found_in_each_head(seed):
    generator = torch.Generator().manual_seed(seed)
    planted = 100 * torch.randn(H, M, 3, generator=generator)
    points = planted.repeat(1, 11, 1) + 0.01 * torch.randn(H, 11 * M, 3, generator=generator)
    found = kmeans(points, M, seed=seed)
    assert torch.cdist(planted, found).amin(-1).max() < 0.05


def test_as_many_points_as_clusters_and_fewer_and_equal_ones():
    points = torch.randn(H, M, 3)
    assert inertia(points, kmeans(points, M)).max() < 1e-9
    assert torch.equal(kmeans(torch.ones(H, 7, 3), M), torch.ones(H, M, 3))
    with pytest.raises(ValueError, match=r"points has 5 points a head, expected at least num_clusters, 6"):
        kmeans(points, M + 1)


def positions_by_sender(send, receive):
    """[N, H, P] and [N, R H, P] -> [H, (1 + R) N, P], for each head that sends all that has to do with its splats."""
    shared = receive.chunk(send.shape[1], 1)
    return torch.stack([torch.cat([send[:, head], part.flatten(0, 1)]) for head, part in enumerate(shared)])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_heads", "senders"), SENDERS.values(), ids=SENDERS)
def test_a_layer_starts_at_the_clusters_of_its_tokens_padding_left_out(num_heads, senders, biased):
    layer = SplatAttention(
        C, num_heads, M, num_key_value_heads=senders, conv_size=3, window_size=4, routing_bias=biased
    )
    tokens = torch.randn(B, T, C)
    mask = torch.ones(B, T, dtype=torch.bool).index_fill(1, torch.arange(4), False)
    initialise_from_batch(layer, {"hidden_states": tokens, "attention_mask": mask}, seed=7)
    send, receive, _, _ = layer.projections(tokens.masked_fill(~mask[..., None], 0.0))
    points = positions_by_sender(send[mask], receive[mask])
    assert torch.equal(layer.centers, kmeans(points, M, seed=7))
    affinities = log_affinity(points.transpose(0, 1)[None], layer.splats)
    spread = affinities.var(-1, correction=0).mean((0, 1)).sqrt()
    torch.testing.assert_close(spread, torch.full((H,), SPREAD), rtol=1e-3, atol=0)


def test_each_layer_of_a_model_sees_what_the_layers_before_it_have_become():
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_splats": 5}
    model = SplatFlowForCausalLM(SplatFlowConfig(**sizes)).train()
    tokens = torch.randint(257, (B, T), generator=torch.Generator().manual_seed(0))
    initialise_from_batch(model, tokens)
    assert model.training
    seen = {}

    def look(name, layer, send, receive):
        seen[name] = torch.cat([send, receive]).transpose(0, 1)

    run_watched(model, {"input_ids": tokens}, look)
    assert len(seen) == 3
    for name, layer in splat_layers(model).items():  # a second run meets the positions of the first
        torch.testing.assert_close(layer.centers.data, kmeans(seen[name], 5), rtol=0, atol=1e-4)


def test_a_model_without_splats_cannot_be_started():
    with pytest.raises(ValueError, match="SoftmaxAttention without splat attention"):
        initialise_from_batch(SoftmaxAttention(C, H), torch.randn(B, T, C))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_softmax_attention_is_a_mixture_of_one_splat_a_key(seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, T, H, 11, generator=generator, dtype=torch.float64)
    keys = torch.randn(H, 13, 11, generator=generator, dtype=torch.float64)  # of different lengths
    log_sharpness = torch.randn(H, generator=generator, dtype=torch.float64)
    scores = torch.einsum("BTHP,HMP->BTHM", queries, keys) * log_sharpness.exp()[:, None] / 11**0.5
    received = route(queries, splats_of_keys(keys, log_sharpness), "mixture")
    torch.testing.assert_close(received, scores.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_heads", "senders"), SENDERS.values(), ids=SENDERS)
def test_a_start_from_attention_copies_it_and_makes_its_keys_the_splats(num_heads, senders, biased):
    options = {"num_key_value_heads": senders, "conv_size": 3, "head_norm": True, "output_gate": True}
    attention, num_tokens, group = SoftmaxAttention(C, num_heads, **options), 3 * 7, num_heads // H
    for parameter in attention.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    num_points = (1 + group) * num_tokens
    layer = SplatAttention(C, num_heads, num_points, window_size=5, routing_bias=biased, **options)
    tokens = torch.randn(3, 7, C)
    initialise_from_attention(layer, attention, tokens)
    for ours, theirs in ((layer.projections, attention.projections), (layer.output, attention.output)):
        assert all(torch.equal(part, theirs.state_dict()[name]) for name, part in ours.state_dict().items())
    assert torch.equal(layer.window_log_scale, attention.log_scale)

    # as many splats as queries and keys: each is one, as sharp as the heads that share it are together
    keys, queries, _, _ = attention.projections(tokens)
    points = positions_by_sender(keys.flatten(0, 1), queries.flatten(0, 1))  # [H, N, P]
    sharpness = attention.log_scale.unflatten(0, (H, group)).mean(1).exp()
    scores = torch.einsum("HSP,HNP->SHN", points * sharpness[:, None, None], points) / (C / num_heads) ** 0.5
    received = route(points.transpose(0, 1)[None], layer.splats, "mixture")[0]
    order = torch.cdist(points, layer.centers).argmin(-1)  # [H, N]
    assert all(len(set(row.tolist())) == num_points for row in order)
    expected = scores.softmax(-1)
    torch.testing.assert_close(received.gather(-1, order.expand_as(expected)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tied_positions": True}, r"projections\.send_proj\.weight of shape None"),
        ({"position_dim": 6}, r"projections\.receive_proj\.weight of shape \[12, 24\], expected \[24, 24\]"),
        ({"conv_size": 3}, r"projections\.convolution\.weight of shape .* expected None"),
        ({"head_norm": True}, r"output\.norm\.weight of shape .* expected None"),
    ],
)
def test_a_layer_of_another_build_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        initialise_from_attention(SplatAttention(C, H, M, **options), SoftmaxAttention(C, H), torch.randn(B, T, C))


@pytest.mark.parametrize(("heads", "senders"), [(2 * H, 2 * H), (H, 1), (2 * H, H)])
def test_an_attention_of_other_heads_is_refused_and_nothing_is_copied(heads, senders):
    layer, attention = SplatAttention(C, H, M), SoftmaxAttention(C, heads, num_key_value_heads=senders)
    before = {name: part.clone() for name, part in layer.named_parameters()}
    message = f"layer has {H} heads, {H} of which send, expected {heads} and {senders} as in the attention"
    with pytest.raises(ValueError, match=message):
        initialise_from_attention(layer, attention, torch.randn(B, T, C))
    assert all(part.equal(before[name]) for name, part in layer.named_parameters())
