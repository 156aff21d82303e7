"""One parametric decoder for every supported family."""
