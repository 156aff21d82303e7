"""From an adapter's name to a verified folder on local disk. No torch, no engine."""
