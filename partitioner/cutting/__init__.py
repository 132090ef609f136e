"""Divide a model between two parties: find legal cuts, and build the stages that each party runs.

Modules here may import every other package of the partitioner except the reports.
"""
