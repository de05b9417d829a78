"""GGUF: models read and written, LoRA adapters written."""
