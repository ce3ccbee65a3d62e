"""What a run tells: files for machines, lines for people."""
