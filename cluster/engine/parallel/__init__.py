"""One model replica on several ranks: tensor parallel within a stage, stages of layers one after another.

`shard` says what each rank holds, `weights` reads it, `layers` and `ranks` join what the ranks of a stage compute,
`stage` runs a rank's part of a step; `leader` is the worker's own rank and owns the others' processes (`follower`).
"""
