"""Request and response models of the public HTTP interfaces."""
