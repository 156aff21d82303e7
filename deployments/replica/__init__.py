"""One adapter store and one engine behind a Serve deployment. No HTTP, no text."""
