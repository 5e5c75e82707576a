"""What is asked of a cluster and what became of it: arrivals, lengths, traces; records, reports, the search for the
highest rate. The same for real load (`cluster.bench`) and in virtual time (`cluster.sim`). Pure.
"""
