"""Measurements of time: what runs how fast, beside which peer, on which machine."""
