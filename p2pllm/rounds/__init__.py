"""The round protocol: how peers turn their updates into one step that all of them take.

`plan` holds the decisions as pure functions; `roster`, `vote`, `round`, `keeper` and `loop` are the thin shells
that gather what `plan` needs and act on its answer. Start reading at `loop.TrainingLoop.run`.
"""
