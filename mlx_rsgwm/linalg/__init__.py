"""Low-rank algebra on arrays, without a model."""
