"""From a model reference (alias, folder, GGUF file, Hugging Face id, `dummy:<config>`) to local files and architecture facts.

`config` holds the facts (`ModelConfig`), `reference` resolves, `fetch` downloads, `gguf` reads GGUF. No torch here: the
router and the planner use it too; tensors are loaded in `cluster.engine.weights`.
"""
