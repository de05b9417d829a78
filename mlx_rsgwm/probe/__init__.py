"""Will adapters merge well? Measures of pairs, a predictor fitted on what merges did, and a decision."""
