"""A network on one machine: namespaces as machines, lines between them, and what the lines really do."""
