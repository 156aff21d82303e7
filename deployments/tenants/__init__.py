"""Who asks, and what they may: keys, limits, namespaces."""
