"""`worker`: the shell every worker process is: engine thread, gRPC server, registration and heartbeat, role as
versioned run-time state.
"""
