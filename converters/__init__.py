"""The edges: PEFT, GGUF and the Hub, and the proof that what crosses them is unchanged."""
