"""Tokens to text and back: vocabulary, chat template, detokenizer. No HTTP, no Ray."""
