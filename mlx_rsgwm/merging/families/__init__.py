"""The merge methods, one family a module; ``merging.methods`` lists them all."""
