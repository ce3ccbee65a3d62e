"""`python -m qwhisper` is `qwhisper`."""

from qwhisper.cli import entry_point

if __name__ == "__main__":
    entry_point()
