"""Knowing before merging: spectra of adapters, how pairs of them lie to each other, a plan, and what a merge did."""
