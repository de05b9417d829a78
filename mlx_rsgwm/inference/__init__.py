"""Draft, score, accept or retry: answers that carry a score."""
