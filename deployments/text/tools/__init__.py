"""Tools: find how a model writes calls of functions, and read them from its answers."""
