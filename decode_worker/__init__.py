"""`decode_worker`: the decode service: grants credits, pulls KV, and streams the rest of each answer."""
