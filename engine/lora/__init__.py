"""Load adapters: turn a PEFT folder into weights that a mixed batch can use."""
