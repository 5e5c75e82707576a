"""Searches placements by simulation: how many workers of which role, with which TP x PP, on which nodes (DistServe,
OSDI '24, §4), against the best colocated plan. Pure.
"""
