"""A second, smaller model that guesses next tokens."""
