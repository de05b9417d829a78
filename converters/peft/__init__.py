"""LoRA adapters between this project's folders and PEFT's."""
