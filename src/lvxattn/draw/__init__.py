"""Draw rotations, traces and plans."""
