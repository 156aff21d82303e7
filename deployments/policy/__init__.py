"""Routing, admission and autoscaling as pure functions of plain data."""
