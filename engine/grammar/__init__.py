"""Grammars that outputs must match: compiled, and turned into token masks, by other processes."""
