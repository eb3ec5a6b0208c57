"""The recipes, their parts, and what measures them; a recipe itself is run by its path."""
