"""`launch`: what starts and composes processes: a worker from its services, a router, a cluster on Ray.

Ray is imported here and nowhere else.
"""
