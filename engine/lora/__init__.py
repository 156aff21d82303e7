"""Adapters: from a PEFT folder to weights that a mixed batch can use."""
