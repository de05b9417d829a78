"""A base with an adapter fused into its weights."""
