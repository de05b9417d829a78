"""Statistics: estimates with their intervals, and tests."""
