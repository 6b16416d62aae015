"""Where examples come from, how they become tokens, and batches as a pure function of (seed, step)."""
