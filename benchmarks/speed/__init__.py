"""How quick splat attention is beside a copy of its minimum bytes and beside its peers, each kernel checked first."""
