"""The causes that a diagnosis knows: one file each, with an `EXPLANATION`."""
