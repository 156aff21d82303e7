"""Computes a model's memory (weights, KV cache, adapters) and step floor without starting it."""
