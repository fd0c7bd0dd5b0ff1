"""The protocol alone: thousands of peers with the real code, in virtual time, without training."""
