"""Operator, layer and model compile into one graph that computes the same."""

import subprocess
import sys

import pytest

# In a process of its own: the checks of shapes that conftest installs cannot be traced.
SCRIPT = """
import torch
from splatflow import SplatAttention, SplatCrossAttention, Splats, splat_attention
from splatflow.models import (
    SplatFlowConfig,
    SplatFlowForCausalLM,
    SplatFlowForMaskedLM,
    SplatFlowForSequenceClassification,
)

torch.manual_seed(0)
positions, values = torch.randn(2, 131, 3, 5), torch.randn(2, 131, 3, 7)
splats = Splats(torch.randn(3, 11, 5), torch.zeros(3, 11), torch.zeros(3, 11))
cross_layer = SplatCrossAttention((33, 14), 3, 7, write_gate=True, conv_size=4)
layer = SplatAttention(33, 3, 7, position_dim=6, window_size=5, conv_size=4, decay="splat", write_gate=True)
wider_layer = SplatAttention(33, 3, 7, transform="linear", hops=2)
lagged = SplatAttention(33, 3, 7, transform="lagged", lag=16, position_dim=6, window_size=5, decay="splat")
two_phases = SplatAttention(33, 3, 7, transform="mlp", causal=False)
hidden_states, tokens = torch.randn(2, 67, 33), torch.randint(257, (2, 37))
mask = torch.ones_like(tokens).index_fill(1, torch.arange(3), 0)


def model(mixer, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_splats": 5, "window_size": 6}
    model = SplatFlowForCausalLM(SplatFlowConfig(**sizes, mixer=mixer, **options)).eval()

    def prompt_and_next_token():
        outputs = model(tokens, attention_mask=mask, use_cache=True)
        return outputs.logits, model(tokens[:, :1], past_key_values=outputs.past_key_values).logits

    return prompt_and_next_token


def bidirectional_models():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_splats": 5}
    config = SplatFlowConfig(**sizes, causal=False, decay=None)
    masked, classifier = SplatFlowForMaskedLM(config).eval(), SplatFlowForSequenceClassification(config).eval()

    def losses_and_logits():
        outputs = masked(tokens, mask, labels=tokens), classifier(tokens, mask, labels=tokens[:, 0] % 2)
        return [part for output in outputs for part in output.to_tuple()]

    return losses_and_logits


many = [torch.randn(1, 521, 1, 5), torch.randn(1, 521, 1, 7), torch.randn(1, 128, 5), torch.zeros(1, 128)]


def out_of_reach():
    far = Splats(many[2] + 40 * (torch.arange(128) % 4)[:, None], *many[3:] * 3)
    return splat_attention(many[0], many[0], many[1], far, routing="compact")[0]


functions = {
    "out of reach": out_of_reach,
    "causal": lambda: splat_attention(positions, positions, values, splats, log_decay=-values[..., 0].abs())[0],
    "bidirectional": lambda: splat_attention(positions, positions, values, splats, causal=False)[0],
    "layer": lambda: layer(hidden_states)[0],
    "wider layers": lambda: tuple(layer(hidden_states)[0] for layer in (wider_layer, two_phases, lagged)),
    "two streams": lambda: tuple(cross_layer((hidden_states, hidden_states[:, :19, :14]))[0]),
    "splat model": model("splat", token_bias=True, position_bias=11),
    "softmax model": model("softmax"),
    "bidirectional models": bidirectional_models(),
}
function, backend = functions["NAME"], "BACKEND"
with torch.no_grad():
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(), function(), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("bidirectional", "inductor"),  # one with generated code: it takes half a minute
        ("causal", "aot_eager"),
        ("out of reach", "eager"),  # which skips, and compiled does not
        ("layer", "aot_eager"),
        ("wider layers", "eager"),
        ("splat model", "aot_eager"),
        ("softmax model", "aot_eager"),
        ("two streams", "eager"),
        ("bidirectional models", "aot_eager"),
    ],
)
def test_compiled_in_one_graph_equals_eager(name, backend):
    script = SCRIPT.replace("NAME", name).replace("BACKEND", backend)
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
