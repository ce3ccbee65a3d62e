"""The output of a run: files for machines, lines for people."""
