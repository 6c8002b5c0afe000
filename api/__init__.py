"""What clients see: settings, HTTP, the command line, and the composition root."""
