"""Role-Specific Gradient-Weighted Merging of LoRA adapters on MLX, and draft–verify answers from the result."""

__version__ = "0.1.0"

from mlx_rsgwm import converters as converters  # fills the table of readers of base files
