"""The checks of annotated shapes, which the tests install, find a call that lies."""

import jaxtyping
import pytest
import torch

from splatflow.ops import window


def test_a_call_that_lies_about_its_shapes_fails_even_after_one_that_does_not():
    window.rotate(torch.randn(5, 3, 2))
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError, match="vectors"):
            window.rotate(torch.randn(3, 2))


def test_a_result_that_is_no_tensor_fails(monkeypatch):
    monkeypatch.setattr(window.torch, "cat", lambda parts, dim: parts)
    with pytest.raises(jaxtyping.TypeCheckError):
        window.rotate(torch.randn(1009, 3, 2))  # a shape of no other test: calls alike are not checked again
