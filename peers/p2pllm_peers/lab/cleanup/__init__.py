"""What a lab makes on this machine, written down before it is made, and undone whatever ends the lab."""
