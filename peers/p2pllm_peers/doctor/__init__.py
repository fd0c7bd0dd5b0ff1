"""The doctor: what this machine would contribute to a run, measured, judged, and said.

`examine` does all of it. `findings` is what it finds out: about the machine (`machine`), about its compute, with the
worker's own code (`measure`), and about the run and the way to it (`outside`). `sizes` are the estimates of bytes,
`judge` says what follows, `words` says it to people; these three are pure. It leaves nothing behind and becomes no
member of the run.
"""
