"""Many adapters and verified answers on one resident base, behind the API that OpenAI's clients speak."""
