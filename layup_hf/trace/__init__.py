"""What each worker did and waited for, as a trace that Perfetto opens. See `docs/trace.md`."""
