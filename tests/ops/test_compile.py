"""The operator compiles into one graph that computes the same."""

import torch
from cases import attend, make_arguments, relative_error


def test_compiled_in_one_graph_equals_eager():
    arguments = make_arguments(T=131, decay="head", state=True)
    both_ways = {name: part for name, part in arguments.items() if name != "log_decay"}

    def function(arguments, both_ways):
        return attend(arguments, backend="chunked"), attend(both_ways, backend="chunked", causal=False)

    expected = function(arguments, both_ways)
    actual = torch.compile(function, fullgraph=True)(arguments, both_ways)
    for (output, state), (right_output, right_state) in zip(actual, expected, strict=True):
        assert relative_error(output, right_output) <= 1e-12
        assert relative_error(state.total, right_state.total) <= 1e-12
