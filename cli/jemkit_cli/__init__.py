"""The command line: it parses, calls one function of the core, prints."""
