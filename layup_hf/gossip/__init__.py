"""Who offers, who merges, and how all agree."""
