"""Studies that train, merge and evaluate at once: controls, merge sweeps, the paper's tables, lm-eval."""
