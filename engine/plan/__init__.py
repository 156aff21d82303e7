"""What a model costs before it is started: weights, KV and adapters, and the step floor."""
