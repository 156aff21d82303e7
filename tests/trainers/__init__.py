"""Adapters as other people's trainers really write them."""
