"""The steps that merge methods are composed of: arrays in, arrays out."""
