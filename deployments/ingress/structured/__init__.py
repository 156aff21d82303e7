"""Structured output: from what a request asks for to the grammar that the engine enforces."""
