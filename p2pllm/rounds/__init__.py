"""The round protocol: how peers turn their updates into one step that all of them take, and a log of these steps.

README.md beside this file has the protocol on one page, what it guarantees, how long one peer can delay a round, and
where all that ends. `plan` and `chain` hold the decisions as pure functions; the others are the thin shells that gather
what these need and act on the answer. Start reading at `loop.TrainingLoop.run`.
"""
