"""Token ids in, token ids out. No text, no tenant keys and no Ray below this line."""
