"""What keeps a run alive: files, folders, precision, progress."""
