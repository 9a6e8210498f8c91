"""Commands: each parses, calls the library and prints. No logic of their own."""
