"""The proof that an adapter means the same to torch as to MLX."""
