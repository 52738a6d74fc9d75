"""The training worker: the only package that imports torch.

It lives beside the node agent, reads jobs from a spool directory (node_agent/spool.py), never the
network, and never anything of the coordinator. This module itself imports nothing, so that the
torch-free parts (``data``) can be used without torch.
"""
