"""Programs for users; `make/` holds the programs that made the assets."""
