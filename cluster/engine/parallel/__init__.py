"""One model replica on several ranks: tensor parallel within a stage, stages of layers one after another.

`shard` says what each rank holds, `weights` reads it, `layers` and `ranks` join what the ranks of a stage compute,
`stage` runs a rank's part of a step. `leader` is the worker's own rank; the others are processes (`follower`) that
`rank_process` hands it, children of its own or who came through its `door`, and that it watches (`followers`).
On GPUs `engine.gpu.part` and `devices.cuda_ranks` are what `stage` and `leader` are on processors.
"""
