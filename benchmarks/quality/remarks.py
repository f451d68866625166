"""What people have to say about the figures: how to read them, and the best explanation found for each."""

HOW_TO_READ = """
Every figure of this page comes from `benchmarks/results/quality.jsonl`, a line for each run with its machine, commit
and command, and is written here by `python -m benchmarks.quality report`. (`+dirty` behind a commit: the ledger itself
had grown since.) Bounds that need no training are in [theory.md](theory.md).

**One house for all.** Two pre-norm blocks of a mixer and a SwiGLU, width 64, two heads, a short convolution of four
tokens on queries, keys and values, an RMS norm in each head, no output gate. Embeddings begin at RMS 1, in which every
contestant learns soonest of what was tried ([log](log.md); runs of the first try are in `quality-first-init.jsonl`, in
the same folder). Every mixer has the activations, norms and gates of its own paper; speeds of forgetting that are drawn
at random there begin evenly spread over the same range. Each operator is compared with flash-linear-attention's own to
1e-5 (`benchmarks/rivals/against_peers.py`).

**Equal state.** Numbers remembered of one sequence in a layer, all counted: contents, keys of slots, normalisers, the
convolution's last inputs, and `2 w D` a head for a window of `w`. All but softmax attention, whose state grows, are
within 2 % of the size in the heading. **Equal parameters:** the SwiGLUs are as wide as it takes to be within 2 %.
**Operations** are multiply-adds of one token in the mixing of one layer, done as a recurrent step; projections are left
out, and softmax attention is counted at the full length.

**Equal tuning.** Four learning rates on seed 0, a further one while the best lies at an edge; of rates within 0.01 of
the best the lowest is taken; then three fresh seeds, which are the only ones in the tables. The same batches for all.
`±` is a 95 % interval by Student's t over the seeds; differences are taken seed by seed. *Ahead* and *behind* mean that
the interval of the paired difference from the best rival excludes 0. *Solved* counts seeds with a mean accuracy of 0.9.
With three seeds the interval is wide: a mixer that fails to learn on one seed has an interval of half the scale, and
nothing can be said to be ahead of it.
""".strip()

REMARKS = {
    "standings": """
**What this supports, and what not.** These are models of 0.1 M parameters after a million tokens. At that budget a part
of every difference is how soon a mixer begins to learn at all, and nothing here says how they compare when they have
read enough.

- *Pairs per byte of state*: behind Based in `wide recall`, and on the mean in `recall`, where its interval of three
  seeds leaves it open (Based has full marks there, so that more is true of it). Beside the mixers of the largest
  trained models of fixed state (gated delta net, Mamba-2, Gated Slot Attention, Raven) splats are ahead in `wide
  recall` at two of three sizes; at the third, as in `recall`, no difference is shown. A guess at the reason: all that
  is asked here is to keep and to find. Based and splats begin by keeping everything, while those four begin by
  forgetting and have to learn not to, and need longer for it than they are given. Based may be ahead of splats because
  products of a few channels of keys are features of a better kind: any two different keys are told apart by some of
  them, while a splat's share is a smooth function of the place.
- *Pairs per operation*: at equal state behind Based, where it takes part: two routings of 32-wide positions cost as
  much again as the memory itself, which Based has not to pay. A lattice of 256 splats of which a token touches four is
  ahead of the best rival, for what it costs does not grow with what it remembers: its state is ten times as large,
  17,472 numbers, so this is no comparison at equal state. Choosing the four is not counted as multiply-adds. In
  `recall` it and Based have full marks both, and the difference is that of their operations.
- *Re-bound keys*: behind the gated delta net, which takes back what it wrote; a mean keeps both values.
- *Bits per byte*: behind Mamba-2 and, on the mean, ahead of the other rivals and of a window alone, once a token's own
  value is passed on beside the memory, as Mamba-2 does. But softmax attention is behind its own window alone, so this
  table is about early learning and says nothing about memory.
- *The hybrid beside its own window*: no difference shown, and the mean is behind: at equal state it has half the
  window, and what splats remember beyond it is worth less here than the other half. This is an open problem of the
  project.
- *Needle at eight times the length*: the best mean, but no difference shown from the gated delta net; nor from Raven,
  whose seeds lie far apart.
- *Gaussians beside a linear router*: no difference shown anywhere, as theory has it: on normalised positions they are
  one class of functions ([theory.md](theory.md), section 4). No claim is made for Gaussians as routers.
- Each verdict stands for itself, at 95 %: among twenty, one is expected to be wrong.
""".strip(),
    "parts": """
Each line is the first with one part added, at about equal state and parameters, its rate swept on its own (tier
`features`, 1,620 numbers a layer, 500 steps, on bytes 400): the mean over three fresh seeds, and in brackets the paired
difference, bold where its 95 % interval excludes 0. With three seeds only large differences can show, and of a hundred
brackets five are expected to be bold by chance.

What helps: many splats of which a token touches four (recall; its state is ten times as large), and a window beside
the splats on text, by 0.2 bits. The same window costs recall a third, for at equal state it takes half of the splats.
What costs, at equal state: a lagged MLP, whose second state halves the splats, and wider values, for the same reason;
a routing bias; a token table on text; a reach, and the nearest four alone, where keys are re-bound; half of the splats
taken away after training. In selective copying, where what matters must be told from blanks, many splats and the
nearest four cost. That task tells least, for seeds that have learnt it and seeds that have not lie far apart.
Repulsion gains 0.022 bits, which is what chance may give. For hops, linear transforms, write gates, tables by place
and the other strategies nothing is shown, from splats that begin spread over the sphere. All of them are off by
default.

`attention start`: a softmax twin learns for as many steps first, and splats begin from it. `twice as long`: splats
learn for as many steps first, and go on under a fresh schedule. The two gain the same where anything is shown,
re-bound keys and text: a twin is worth what the tokens that it has read are worth, no more. Who has no twin gains
nothing by training one. `both directions` has no causal mask, so that questions and fillers dilute what is asked for;
these tasks are made for causal models, and it is here for completeness. What both directions and shared splats are
worth where they belong, two views of one scene, is measured by `python -m benchmarks.two_views`
([rows](../benchmarks/results/2026-11-24-two-views.json)): views that share their splats find 0.940 of what only the
other one sees; with splats of their own, and a learned map between them at twice the state, 0.902.
""".strip(),
    ("cpu", "recall"): """
Frozen random centers do as well as learned ones: it is the projections that learn to find the splats. A window of half
the state beside splats of the other half, which forget, recalls less than splats alone: nothing in this task should be
forgotten. Of those that forget, gated delta net and Mamba-2 learn it better on some seeds than on others, and GLA,
whose factors begin near 1, does on all. `48 pairs` is more than was learnt from.
""".strip(),
    ("cpu", "needle"): """
All learn from 128 bytes. A splat that keeps digits keeps them at any distance: without decay a mean does not know how
long ago it was fed, while positions of softmax attention beyond those learnt from mean nothing to it. Digits are rare
in novels, so there is hardly anything to confuse the needle with: this asks for keeping, not for telling apart.
""".strip(),
    ("features", "recall"): """
Beside the same model without it. Touching only the nearest four of 16 costs no accuracy that is shown and saves three
eighths of the multiply-adds; a reach, a write gate and a routing bias, too, make no difference that is shown here. What
does is to have many splats: the lattice has as large a memory as softmax attention has after 64 tokens.
""".strip(),
    ("more", "wide recall"): """
Twice the pairs of `recall` and twice the words, after the same tokens: harder to learn, and too much to remember in the
smallest memory for anyone. `96 pairs` and `120 pairs` are more than was learnt from. Based has no size near 1,100
numbers.
""".strip(),
}
