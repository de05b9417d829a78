"""Files, errors, settings, progress and the machine: what everything rests on and what knows nothing of models."""
