"""Everything that decides: pure data and pure functions. Never imports torch."""
