"""Programs to copy from: each is one file, started by the command on its top."""
