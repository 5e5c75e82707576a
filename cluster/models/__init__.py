"""From a model reference (alias, folder, GGUF file, Hugging Face id, `dummy:<config>`) to local files and facts.

`reference` resolves, `fetch` downloads, `config` is the shape of the facts (`ModelConfig`), `hf_config` and
`gguf_config` find them in files, `gguf` reads GGUF, `registry` knows published architectures. No torch here: the router
and the planner use it too; tensors are loaded in `cluster.engine.weights`.
"""
