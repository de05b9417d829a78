"""The keys of an ``mlx_lm.lora`` YAML: which only it has, what it takes where none is given, and what others mean.

As of mlx-lm 0.32.2; what is done with each is in ``mlx_lm_yaml``.
"""

from __future__ import annotations

from typing import Any

# Keys that only mlx-lm has: any of them makes a YAML one of mlx-lm's.
FOREIGN = {
    "model", "iters", "adapter_path", "lora_parameters", "steps_per_eval", "steps_per_report", "grad_checkpoint",
    "grad_accumulation_steps", "max_seq_length", "lr_schedule", "optimizer_config", "val_batches", "project_name",
    "resume_adapter_file", "test_batches", "trust_remote_code", "hf_dataset", "clear_cache_threshold", "train",
    "lora_layers", "use_dora", "prompt_feature", "completion_feature", "chat_feature", "text_feature", "adapter_file",
}  # fmt: skip
# Keys that change nothing that is trained here.
NO_EFFECT = {"steps_per_report", "val_batches", "test_batches", "clear_cache_threshold", "config", "wandb"}
# Keys of which the user must do the work, with how.
REFUSED = {
    "hf_dataset": "write the rows to train.jsonl and valid.jsonl in a folder and name it as data",
    "adapter_file": "name the adapter's folder as adapter_path",
    "use_dora": "write fine_tune_type: dora",
}
# Keys that people write and mlx_lm.lora ignores, with where it reads what they mean.
ELSEWHERE = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r", "r"), "lora_parameters: {rank: …}"),
    **dict.fromkeys(("alpha", "lora_alpha", "scale", "lora_scale"), "lora_parameters: {scale: …} (alpha / rank)"),
    **dict.fromkeys(("dropout", "lora_dropout"), "lora_parameters: {dropout: …}"),
    **dict.fromkeys(("keys", "lora_keys", "target_modules", "lora_target_modules"), "lora_parameters: {keys: […]}"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_iters"), "lr_schedule: {warmup: …}"),
    **dict.fromkeys(("grad_accumulation", "gradient_accumulation_steps"), "grad_accumulation_steps"),
    **dict.fromkeys(("epochs", "num_epochs"), "iters (epochs · rows / batch_size)"),
    "weight_decay": "optimizer_config: {adamw: {weight_decay: …}}",
    "max_tokens": "max_seq_length",
}
# What mlx_lm.lora takes for a key that is not given.
DEFAULTS: dict[str, Any] = {
    "fine_tune_type": "lora", "optimizer": "adam", "batch_size": 4, "learning_rate": 1e-5, "iters": 1000,
    "max_seq_length": 2048, "steps_per_eval": 200, "save_every": 100, "seed": 0, "adapter_path": "adapters",
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "num_layers": 16,
}  # fmt: skip
