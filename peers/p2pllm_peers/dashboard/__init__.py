"""The page of a run: a small web server beside the daemons, that asks them no more than once a second."""
