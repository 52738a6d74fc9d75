"""The rules in Cedar: who may do what, and may this plan run here.

minga.cedarschema   what the rules speak about
consortium.cedar    the consortium's rules: ids ``fed.*``
engine.py           cedarpy behind one door that says no to everything that is not surely a yes
methods.py          which method of the coordinator is which action
join.py             the request "may this plan run here", made from a plan, a policy and a data set

Schema and rules are part of the program and are covered by the digest of its code, which the signed
policy names; the numbers they compare with are in the signed policy itself.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def schema_text() -> str:
    """The Cedar schema."""
    return files(__name__).joinpath("minga.cedarschema").read_text("utf-8")


@cache
def consortium_text() -> str:
    """The consortium's rules."""
    return files(__name__).joinpath("consortium.cedar").read_text("utf-8")
