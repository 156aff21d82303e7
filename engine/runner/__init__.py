"""Executes scheduled batches on a device."""
