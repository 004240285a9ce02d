"""Running a plan: executor, engine and what they report."""
