"""Programs that mistreat a real server and check what it promises. Run by hand: `make chaos`."""
