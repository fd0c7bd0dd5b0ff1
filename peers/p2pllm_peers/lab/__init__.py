"""The lab: many peers on one machine, with links and faults made on purpose, and measured.

Read `experiment` first: it runs a scenario from its start to its evidence. Rooms: `network` (the lines between peers),
`cleanup` (nothing stays), `reporting` (from evidence to conclusions), `simulation` (the protocol alone, in virtual
time), `scenarios` (the shipped files).
"""
