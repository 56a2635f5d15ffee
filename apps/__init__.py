"""The front doors: the command line, the report, and what joins policies to rewards."""
