"""Turn an adapter's name into a verified folder on local disk. No torch, no engine."""
