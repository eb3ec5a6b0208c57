"""What is next, and for whom: the clock that all workers draw from, and the data that they share."""
