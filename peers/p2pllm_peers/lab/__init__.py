"""The local multi-peer harness: real daemons on one machine, watched together, with a report at the end."""
