"""Fast forms of casts, in plain numbers: C++ rows on a CPU, Triton on a GPU."""
