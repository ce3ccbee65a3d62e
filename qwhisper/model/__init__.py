"""The joined model: its architecture, its bases and its folders. Its public classes are exported by `qwhisper`."""
