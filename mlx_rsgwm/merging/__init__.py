"""Turning a pool of adapters into one, by a method chosen by name."""
