"""LoRA training that remembers how hard the optimiser pulled on every parameter."""
