"""What the answers are worth: extraction, metrics with intervals, reports."""
