"""From dialogue files to token rows, label masks and waveforms. Knows tokenizer and frame arithmetic, no device."""
