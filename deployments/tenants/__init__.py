"""Tenants: their keys, limits and namespaces. No HTTP, no Ray."""
