"""The ops of the decoder. Plain torch is the specification of each."""
