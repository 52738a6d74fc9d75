"""Threshold-signed governance: what is in force in a federation, and who said so.

keys.py       a key has one id, whoever writes it; who holds it and for which institution
roles.py      the roles of the trust repository: their paths, their keys, how long they last
documents.py  members, admins, emergency notices: parsed once, strictly
signers.py    a threshold counts distinct keys AND distinct institutions
repository.py a whole repository, verified from a root that the reader already trusts
changes.py    what changed between two states, in words, and the majority that it needs
requests.py   what admins sign offline, and what they send back

What changed between two states, in words, and the majority that it needs: policies/trust.py.
Normative text: protocols/spec/governance.md.
"""
