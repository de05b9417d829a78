"""What a tail of scores is like, and when a claim about it holds: generalised Pareto fits, five gates, their report."""
