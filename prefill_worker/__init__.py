"""`prefill_worker`: the prefill service: admits prompts, returns first tokens, and serves the KV to decode workers
until they confirm."""
