"""Pictures of rotations, traces and plans."""
