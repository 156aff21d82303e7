"""Measures an engine on the machine at hand: its steps, its loads and its start."""
