"""LoRA training that keeps Adam's second moment of every parameter, for each role as well: its importance."""
