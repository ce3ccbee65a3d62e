"""The verbs of the command line, one module each: its arguments and `main`. Heavy imports stand inside `main`."""
