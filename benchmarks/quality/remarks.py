"""What people have to say about the figures: how to read them, and the best explanation found for each."""

HOW_TO_READ = """
Every figure of this page comes from `benchmarks/results/quality.jsonl`, a line for each run with its machine, commit
and command, and is written here by `python -m benchmarks.quality report`. Bounds that need no training are in
[theory.md](theory.md).

**One house for all.** Two pre-norm blocks of a mixer and a SwiGLU, width 64, two heads, a short convolution of four
tokens on queries, keys and values, an RMS norm in each head, no output gate. Every mixer has the activations, norms,
gates and initial values of its own paper; each operator is compared with flash-linear-attention's own to 1e-5
(`benchmarks/rivals/against_peers.py`).

**Equal state.** Numbers remembered of one sequence in a layer, all counted: contents, keys of slots, normalisers, the
convolution's last inputs, and `2 w D` a head for a window of `w`. All but softmax attention, whose state grows, are
within 2 % of the size in the heading. **Equal parameters:** the SwiGLUs are as wide as it takes to be within 2 %.
**Operations** are multiply-adds of one token in the mixing of one layer, done as a recurrent step; projections are left
out, and softmax attention is counted at the full length.

**Equal tuning.** Four learning rates on seed 0, a further one while the best lies at an edge; of rates within 0.01 of
the best the lowest is taken; then three fresh seeds, which are the only ones in the tables. The same batches for all.
`±` is a 95 % interval by Student's t over the seeds; differences are taken seed by seed. *Ahead* and *behind* mean that
the interval of the paired difference from the best rival excludes 0. *Solved* counts seeds with a mean accuracy of 0.9.
""".strip()

REMARKS = {
    "standings": "",
}
