"""Trains the demo: a small base model and adapters with visibly different jobs."""
