"""Settings of a model that belong together, by name.

SplatFlowConfig.from_preset("hybrid", hidden_size=512)
ModelConfig(**preset("hybrid"), hidden_size=512)
splatflow train --preset hybrid --model.hidden-size 512
"""

from __future__ import annotations

from typing import Any

from splatflow.requirements import require_one_of

PRESETS: dict[str, dict[str, Any]] = {
    # near tokens exactly, far ones through few splats
    "hybrid": {"window_size": 32, "num_splats": 16},
    # very many splats, of which a token touches four
    "lattice": {"routing": "lattice", "num_splats": 4096, "splat_top_p": 4},
}


def preset(name: str) -> dict[str, Any]:
    """The settings of that name; ValueError if there are none.

    >>> preset("hybrid")
    {'window_size': 32, 'num_splats': 16}
    """
    require_one_of(PRESETS, preset=name)
    return dict(PRESETS[name])
