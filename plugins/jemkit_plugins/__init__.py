"""The built-in plug-ins: one method, one file."""
