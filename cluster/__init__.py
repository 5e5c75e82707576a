"""`cluster`: what every member of the cluster is made of (types, config, clock, rpc, engine, worker) and what runs the
whole (launch, cli).
"""
