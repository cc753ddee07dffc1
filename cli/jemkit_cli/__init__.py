"""The command line: parses options, calls one function of the library, prints its result."""
