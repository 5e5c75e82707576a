"""`proto`: protobuf messages of the public API (`tandem.v1`) and of the cluster's own (`tandem.internal.v1`).

Generated code is committed; `make proto` makes it anew.
"""
