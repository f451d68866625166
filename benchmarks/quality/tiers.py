"""Which experiments belong together, by what they cost."""

from __future__ import annotations

from .contestants import CONTESTANTS, Shell
from .plan import Experiment

# each beside the same model without it, which is "splats"
MANY = "lattice of 256, top 4"
FEATURES = (
    *("splats, compact", "splats, write gate", "splats, routing bias", "splats, window", "splats, linear transform"),
    *("splats, one hop", "splats, wide values", "splats, half kept", "splats, k-means start", "splats, overlap loss"),
    *("splats, minimum distance", "splats, repulsion", "splats, split and prune", "splats, curriculum"),
    *("splats, lagged MLP", "splats, token table", "splats, place table", "splats, two hops", MANY, "splats, top 4"),
    *("splats, attention start", "splats, twice as long"),
)
NOT_CAUSAL = "splats, both directions"  # asked for answers, not for what comes next
EVERYONE = tuple(name for name in CONTESTANTS if "decay" not in name and name not in (*FEATURES, NOT_CAUSAL))
# the strongest of those whose state does not grow, and what they have to be seen beside
STRONGEST = ("gated delta net", "Mamba-2", "GLA", "Gated Slot Attention", "Raven")
CONTROLS = ("window only", "softmax")
LEADERS = ("splats", "linear router", *STRONGEST, "Based")
NEEDLE = ("splats", "linear router", *STRONGEST, *CONTROLS)
LANGUAGE = (
    *("splats, decay", "splats, decay, skip", "linear router, decay, skip", "window + splats"), *STRONGEST, *CONTROLS
)  # fmt: skip
WIDE = Shell(width=128)

TIERS: dict[str, tuple[Experiment, ...]] = {
    # does the bench work, and does it tell apart what must differ? 3 minutes on 2 cores
    "smoke": (Experiment("short recall", ("splats", "window only", "softmax"), state=1100, steps=240),),
    # everyone on recall, the leaders on text: 45 minutes on 2 cores
    "cpu": (
        Experiment("recall", EVERYONE, state=1620, steps=500),
        Experiment("wikitext bytes", LANGUAGE, state=2640, steps=400),
        Experiment("needle", NEEDLE, state=2640, steps=400),
    ),
    # the leaders with less and with more to remember in, on other tasks, and with three times the tokens
    "more": (
        Experiment("wide recall", LEADERS[:-1], state=1100, steps=500),  # Based has no size near it
        Experiment("wide recall", LEADERS, state=1620, steps=500),
        Experiment("wide recall", LEADERS, state=2640, steps=500),
        Experiment("rebound recall", LEADERS, state=1620, steps=500),
        Experiment("selective copying", LEADERS, state=1620, steps=500),
        Experiment("recall", LEADERS, state=1620, steps=1500),
    ),
    # what each part of the idea is worth beside the model without it
    "features": (
        Experiment("recall", ("splats", *FEATURES, NOT_CAUSAL, "Based"), state=1620, steps=500),
        Experiment("wide recall", ("splats", MANY, "Based"), state=1620, steps=500),
        Experiment("rebound recall", ("splats", *FEATURES, NOT_CAUSAL), state=1620, steps=500),
        Experiment("wikitext bytes", ("splats", *FEATURES), state=1620, steps=400),
        Experiment("selective copying", ("splats", *FEATURES, NOT_CAUSAL), state=1620, steps=500),
    ),
    # the same questions with models of twice the width and eight to sixty times the tokens, in pieces of 9 minutes
    "gpu": (
        Experiment("long recall", EVERYONE, state=5248, steps=3000, shell=WIDE, batch_tokens=16_384),
        Experiment("long recall", LEADERS, state=9150, steps=3000, shell=WIDE, batch_tokens=16_384),
        Experiment("needle", NEEDLE, state=9150, steps=3000, shell=WIDE, batch_tokens=16_384),
        Experiment("novel bytes", LANGUAGE, state=9150, steps=6000, shell=WIDE, num_layers=4, batch_tokens=16_384),
        Experiment("listops", NEEDLE, state=5248, steps=3000, shell=WIDE, batch_tokens=16_384),
    ),
}
