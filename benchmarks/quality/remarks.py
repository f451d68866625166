"""What people have to say about the figures: how to read them, and the best explanation found for each."""

HOW_TO_READ = """
Every figure of this page comes from `benchmarks/results/quality.jsonl`, a line for each run with its machine, commit
and command, and is written here by `python -m benchmarks.quality report`. Bounds that need no training are in
[theory.md](theory.md).

**One house for all.** Two pre-norm blocks of a mixer and a SwiGLU, width 64, two heads, a short convolution of four
tokens on queries, keys and values, an RMS norm in each head, no output gate. Every mixer has the activations, norms and
gates of its own paper; speeds of forgetting that are drawn at random there begin evenly spread over the same range.
Each operator is compared with flash-linear-attention's own to 1e-5 (`benchmarks/rivals/against_peers.py`).

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
**What this supports, and what not.** These are models of 0.1 M parameters after 1 to 2 million tokens. At that budget
a large part of every difference is how soon a mixer begins to learn at all.

- *Pairs per byte of state*: no difference shown from the best rival. Splats have the higher mean accuracy and learn on
  every seed; Based reaches as many pairs where it learns, and one of its three seeds did not get as far. Its features
  are many for few channels of keys, so that it too is nearer to a table than to a matrix of associations.
- *Pairs per operation*: no difference shown; the mean is behind, for two routings of 32-wide positions cost as much
  again as the memory itself. The lattice of many splats, of which few are touched, does not exist yet.
- *Bits per byte*: behind. Mamba-2 passes each value on beside its memory, gated by nothing; splats have no way past
  their means, so that a token hears itself only through them. The scatter over seeds (0.1 bits and more, where Mamba-2
  and the window have 0.01) says that they are still finding that way. But softmax attention is behind its own window
  alone, so this table is about early learning and says nothing about memory.
- *The hybrid beside its own window*: no difference shown, and the mean is behind. This is the open problem of the
  project.
- *Needle at eight times the length*: the mean is ahead of Raven's, no difference shown over three seeds, of which
  Raven learnt one badly.
- *Gaussians beside a linear router*: no difference shown anywhere, as theory has it: on normalised positions they are
  one class of functions ([theory.md](theory.md), section 4). No claim is made for Gaussians as routers.
""".strip(),
    "recall": """
Frozen random centers do nearly as well as learned ones: it is the projections that learn to find the splats. Forgetting
hurts here (`splats, decay`), and more so beside a window (`window + splats`): nothing in this task should be forgotten.
Gated delta net and Raven learn on some seeds only, GLA and Mamba-2 on none; those are the mixers that begin by
forgetting, and whose memory is known to hold more than this once they are over that (next tables, if they are there).
`48 pairs` is more than was learnt from.
""".strip(),
    "needle": """
All learn from 128 bytes. A splat that keeps digits keeps them at any distance: without decay a mean does not know how
long ago it was fed, while positions of softmax attention beyond those learnt from mean nothing to it. Digits are rare
in novels, so there is hardly anything to confuse the needle with: this asks for keeping, not for telling apart.
""".strip(),
}
